"""The networks of a stage: each is a network of its own, or one frozen base with an adapter or none.

The real score, the fake score and the generator of a large model share one base, whose weights exist once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from live_avatar.config import Preset
from live_avatar.model.dit import CausalDiT
from live_avatar.model.networks import meta_dit
from live_avatar.weights.tensors import Weights
from training import distributed
from training.config import AdapterConfig, LoRAConfig
from training.distributed import Unit
from training.loop import generator
from training.lora import FACTOR, Adapter, Switch, adapt, draw_factors

T = TypeVar("T")
FAKE = "fake"
"""Name of the fake score's adapter."""


@dataclass(frozen=True)
class Role:
    """A network of a stage.

    module: what of it is trained and saved. together: whether all processes must make the same passes.
    """

    unit: Unit
    module: nn.Module
    switch: Switch | None = None
    adapter: str | None = None
    together: bool = False

    def __call__(self, work: Callable[[CausalDiT], T]) -> T:
        """The result of `work` with the network: tensors, or nested tuples, lists and dicts of tensors."""
        with nullcontext() if self.switch is None else self.switch.to(self.adapter):
            return cast(T, self.unit(work))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters to train."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]


def whole(network: CausalDiT) -> Role:
    """A network of its own, sharded as one unit; make optimisers only after this."""
    return Role(distributed.shard(network), network)


class SharedBase:
    """One frozen network with several adapters.

    The network may be on torch's meta device, and then has no values until `fill`. ranks: as in `shard_layers`.
    """

    def __init__(
        self, network: CausalDiT, settings: LoRAConfig, names: tuple[str, ...], recompute: bool, ranks: int = 0
    ) -> None:
        self._switch = adapt(network, settings, names)
        if recompute:
            _recompute(network, self._switch)
        self.unit = distributed.shard_layers(network, ranks or distributed.world())
        self.network = network

    def fill(self, weights: Weights, device: torch.device) -> None:
        """Moves the network to a device and reads its weights, one tensor at a time; adapters stay without values."""
        self.unit.to_empty(device=device)
        with torch.no_grad():
            for name, parameter in self.network.named_parameters():
                if not FACTOR.search(name):
                    distributed.fill(parameter, weights.read(name))

    def role(self, adapter: str | None) -> Role:
        """The base with the adapter of that name, or alone."""
        module = nn.Module() if adapter is None else Adapter(self.network, adapter)
        return Role(self.unit, module, self._switch, adapter, together=True)


def _recompute(network: CausalDiT, switch: Switch) -> None:
    """Lets the backward pass compute every layer again, so that only its input, keys and values are kept."""
    network.layer = _checkpointed(network.layer, switch)  # type: ignore[method-assign]


def _checkpointed(work: Callable[..., T], switch: Switch) -> Callable[..., T]:
    def run(*given: object) -> T:
        if not torch.is_grad_enabled():
            return work(*given)
        name = switch.name  # of now: when the backward pass comes, another adapter may take part
        made = checkpoint(
            work,
            *given,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), switch.to(name)),
        )
        return cast(T, made)

    return run


def open_base(config: AdapterConfig, names: tuple[str, ...]) -> SharedBase:
    """The checkpoint of a configuration as a base with new adapters. Raises `CheckpointError` and `ConfigError`."""
    weights = config.weights().parts["dit"]
    base = empty_base(config, config.system, names)
    base.fill(weights, distributed.device())
    for name in names:
        draw_factors(base.network, generator(config.seed, "adapter", name), name)
    return base


def empty_base(config: AdapterConfig, system: Preset, names: tuple[str, ...]) -> SharedBase:
    """The same without values, on the meta device."""
    return SharedBase(meta_dit(system), config.lora, names, config.recompute, config.shard_ranks)
