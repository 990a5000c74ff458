"""Training with several processes: they split the clips of a batch, and FSDP2 shards the weights.

torchrun starts them; a single process needs nothing of this. Random draws depend on the clip and not on the process, so
any number of processes takes the same steps up to rounding.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from live_avatar.errors import ConfigError
from live_avatar.model.dit import CausalDiT

T = TypeVar("T")


OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def join() -> None:
    """Joins the other processes of torchrun, if there are several.

    Raises `ConfigError` where a restart would hang: torchrun of torch 2.13 keeps the addresses of processes that have
    ended, and those that come back connect to them.
    """
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ConfigError(
            f"torchrun has --max-restarts {restarts}, but its processes would not find one another after a restart; "
            f"set {OWN_STORE}=1 in its environment."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def leave() -> None:
    """Leaves the group of processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process writes logs and checkpoints."""
    return rank() == 0


def device() -> torch.device:
    """This process's device: its GPU, or the CPU if there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def share(batch: int) -> range:
    """Numbers of the batch's clips for this process. Raises `ConfigError` if the clips cannot be split evenly."""
    if batch % world():
        raise ConfigError(
            f"a batch of {batch} clips cannot be split evenly among {world()} processes; make batch a multiple of them."
        )
    return range(rank(), batch, world())


def mean(figure: float | Tensor) -> float:
    """The mean of a figure over all processes."""
    total = torch.as_tensor(figure, dtype=torch.float64).detach().to(device())
    if world() == 1:
        return total.item()
    dist.all_reduce(total)
    return total.item() / world()


def barrier() -> None:
    """Waits for all processes, so that all see the files that the first one has written."""
    if world() > 1:
        dist.barrier()


def any_rank(fact: bool) -> bool:
    """Whether `fact` is true in any process; all processes must call it together."""
    return mean(float(fact)) > 0


class Unit(nn.Module):
    """A network that is whole during a pass, and otherwise sharded if there are several processes.

    The whole network is one unit of sharding, because its parts are used out of order (`text_kv`, `prefill`), which
    FSDP's hooks on single layers do not see. So a process needs memory for one whole network in a pass; gradients and
    optimiser states are always sharded.
    """

    def __init__(self, network: CausalDiT) -> None:
        super().__init__()
        self.network = network

    def forward(self, work: Callable[[CausalDiT], T]) -> T:
        """The result of `work` with the network: tensors, or nested tuples, lists and dicts of tensors."""
        return work(self.network)


def shard(network: CausalDiT) -> Unit:
    """The network as a unit, on this process's device; make optimisers from its parameters only after this."""
    unit = Unit(network.to(device()))
    if world() > 1:
        from torch.distributed.fsdp import fully_shard

        _allow_views()
        fully_shard(unit)
    return unit


def shard_layers(network: CausalDiT, ranks: int) -> Unit:
    """The network as a unit, of which only the layers in use are whole; it may be on the meta device.

    ranks: number of processes that share one copy. Their parameters stay in their own types, and gradients are summed
    in float32. The modulation of each layer is left whole: it is small, frozen and used out of its layer's forward
    pass. All processes must make the same passes.
    """
    unit = Unit(network)
    if world() == 1:
        return unit
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    _allow_views()
    injector = network.audio_injector
    layers, attentions = list(network.layers), list(injector.injector)
    outside = [network.text_embedding, network.time_embedding, network.time_projection, network.frame_packer]
    options: dict[str, Any] = {
        "mesh": _mesh(ranks),
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
        "ignored_params": {layer.modulation for layer in layers},
    }
    for part in (*layers, *attentions, *injector.injector_adain_layers, *outside, network.casual_audio_encoder):
        fully_shard(part, **options)
    for parts, method in ((layers, "text_kv"), (attentions, "across")):
        for part in parts:
            register_fsdp_forward_method(part, method)
    fully_shard(unit, **options)
    return unit


def _allow_views() -> None:
    """A unit may return a view. torch warns of writes into one, and nothing here writes into it."""
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)


def _mesh(ranks: int) -> Any:
    """Processes in groups of `ranks`, each with one copy. Raises `ConfigError` if they cannot be split evenly."""
    from torch.distributed.device_mesh import init_device_mesh

    if world() % ranks:
        raise ConfigError(
            f"{world()} processes cannot be split evenly into groups of {ranks}, which share one copy of the base; set "
            "shard_ranks to a divisor of their number."
        )
    if ranks == world():
        return init_device_mesh(device().type, (ranks,), mesh_dim_names=("shard",))
    return init_device_mesh(device().type, (world() // ranks, ranks), mesh_dim_names=("copy", "shard"))


def fill(held: Tensor, whole: Tensor) -> None:
    """Copies a whole tensor into one that may be sharded: each process takes its own part."""
    local = to_local(held)
    if local is not held:
        mesh = cast(Any, held).device_mesh
        parts = whole.chunk(mesh.size(-1))
        own = mesh.get_local_rank(-1) if mesh.ndim > 1 else mesh.get_local_rank()
        whole = parts[own] if own < len(parts) else whole[:0]
    local.copy_(whole)


def gathered(state: T) -> T:
    """A state dict, or nested mappings and lists, with every sharded tensor whole on the CPU.

    All processes must call it together.
    """
    if world() == 1:
        return state
    if isinstance(state, Tensor):
        return cast(T, _whole(state))
    if isinstance(state, Mapping):
        return cast(T, {name: gathered(value) for name, value in state.items()})
    if isinstance(state, list):
        return cast(T, [gathered(value) for value in state])
    return state


def to_local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded; it shares its memory."""
    if world() == 1:
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor.cpu()


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, sharded like another one; unchanged if that one is whole."""
    if world() == 1:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def load_network(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Loads whole tensors into a network, sharded or not."""
    network.load_state_dict({name: shard_like(tensors[name], held) for name, held in network.state_dict().items()})


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Loads a gathered state into an optimiser whose parameters may be sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    spread_state = {
        index: {name: _like_parameter(value, parameters[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": spread_state})


def _like_parameter(value: Any, parameter: Tensor) -> Any:
    moment = isinstance(value, Tensor) and value.shape == parameter.shape
    return shard_like(value, parameter) if moment else value
