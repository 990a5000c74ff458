"""Times the torch networks with random weights on one device, each run in several ways.

The time of a product does not depend on its values, so no checkpoint is needed, not even for the released sizes on a
GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from live_avatar.config import Preset
from live_avatar.graphs.contract import Contract, Extent
from live_avatar.model.attention import Linear
from live_avatar.model.linears import is_lora_target
from live_avatar.model.networks import Networks, meta_networks, replace_parameters
from live_avatar.weights.fp8 import quantize
from perf.roofline import Ceilings

Outputs = tuple[Tensor, ...]
Work = Callable[[], Any]

ATTENTIONS = (
    SDPBackend.MATH,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
)
GRAPH_WARM_UPS = 3  # torch requires some runs on another stream before the capture


def device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(on: torch.device) -> str:
    return torch.cuda.get_device_name(on) if on.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


# ---- Networks and inputs without files


def random_networks(preset: Preset, on: torch.device, seed: int = 0) -> Networks:
    """Transformer, VAE and speech encoder of the preset's sizes and types, made on the device. The text encoder stays
    without weights, because no block runs it."""
    networks = meta_networks(preset)
    generator = torch.Generator(on).manual_seed(seed)

    def drawn(name: str, parameter: Tensor) -> Tensor:
        if parameter.dim() < 2:
            return torch.full(parameter.shape, float(not name.endswith("bias")), dtype=parameter.dtype, device=on)
        scale = (parameter.numel() / parameter.shape[0]) ** -0.5
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device=on)
        return values.normal_(0, scale, generator=generator)

    for network in (networks.dit, networks.vae, networks.speech):
        replace_parameters(network, drawn)
    return networks


def random_tensors(
    contract: Contract, on: torch.device, extent: Extent, profile: str | None = None, seed: int = 0
) -> list[Tensor]:
    """Inputs of a component, made on the device; symbolic dimensions have the given extent."""
    generator = torch.Generator(on).manual_seed(seed)
    return [
        torch.empty(contract.shape(spec, extent, profile), dtype=getattr(torch, spec.dtype), device=on).normal_(
            generator=generator
        )
        for spec in contract.inputs
    ]


# ---- Ways of running a component


class FP8Linear(nn.Module):
    """A linear with e4m3fn weights and activations, one scale each; each call computes the scale of the activations."""

    weight: Tensor
    inverse: Tensor

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        weight, inverse = quantize(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("inverse", inverse)
        self.bias = linear.bias
        self.kind = linear.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] of any floating type -> [..., out] of the original type of the weights."""
        rows, inverse = quantize(x.flatten(0, -2))
        product = torch._scaled_mm(
            rows, self.weight.t(), scale_a=inverse, scale_b=self.inverse, bias=self.bias, out_dtype=self.kind
        )
        return product.reshape(*x.shape[:-1], -1)


def to_fp8(network: nn.Module) -> int:
    """Replaces the linears that an FP8 export quantizes by FP8 ones, for good; returns how many."""
    found = [name for name, part in network.named_modules() if isinstance(part, Linear) and is_lora_target(name)]
    for name in found:
        parent, _, child = name.rpartition(".")
        owner = network.get_submodule(parent)
        setattr(owner, child, FP8Linear(owner.get_submodule(child)))  # type: ignore[arg-type] # found as Linear above
    return len(found)


def eager(module: nn.Module, inputs: Sequence[Tensor]) -> Work:
    return lambda: module(*inputs)


def compiled(module: nn.Module, inputs: Sequence[Tensor]) -> Work:
    """torch.compile with fixed shapes."""
    fast = torch.compile(module, dynamic=False)
    return lambda: fast(*inputs)


def cuda_graph(module: nn.Module, inputs: Sequence[Tensor]) -> Work:
    """The eager kernels captured once and launched together."""
    return _captured(lambda: module(*inputs))


def compiled_cuda_graph(module: nn.Module, inputs: Sequence[Tensor]) -> Work:
    return _captured(compiled(module, inputs))


def channels_last(module: nn.Module, inputs: Sequence[Tensor]) -> Work:
    """Weights of convolutions and inputs with the channels innermost. The module stays so."""
    for parameter in module.parameters():
        parameter.data = _channels_last(parameter.data)
    turned = [_channels_last(x) for x in inputs]
    return lambda: module(*turned)


def _channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()]) if x.dim() in formats else x


def _captured(work: Work) -> Work:
    if not torch.cuda.is_available():
        raise NotImplementedError("a CUDA graph needs a GPU")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(GRAPH_WARM_UPS):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = work()

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay


# ---- Time


@dataclass(frozen=True)
class Timed:
    """Median seconds of a piece of work and its result, or why it could not be run here."""

    seconds: float | None
    outputs: Outputs = ()
    not_run: str = ""


def timed(make: Callable[[], Work], on: torch.device, runs: int) -> Timed:
    """Runs it twice, then `runs` times with the device idle before and after. Compilers and kernels may refuse it with
    any error; then the error is the result."""
    try:
        with torch.inference_mode():
            work = make()
            outputs = [work() for _ in range(2)][-1]
            seconds = median(_seconds(work, on) for _ in range(runs))
    except Exception as error:
        sentence = next(iter(str(error).splitlines()), "")
        return Timed(None, not_run=f"{type(error).__name__}: {sentence[:200]}")
    return Timed(seconds, outputs if isinstance(outputs, tuple) else (outputs,))


def _seconds(work: Work, on: torch.device) -> float:
    _wait(on)
    begun_s = time.perf_counter()
    work()
    _wait(on)
    return time.perf_counter() - begun_s


def _wait(on: torch.device) -> None:
    if on.type == "cuda":
        torch.cuda.synchronize(on)


def difference(outputs: Outputs, expected: Outputs) -> float:
    """Relative RMS difference of the first output, which is the velocity, the frames or the features."""
    mine, theirs = outputs[0].double(), expected[0].double()
    return float((mine - theirs).square().mean().sqrt() / theirs.square().mean().sqrt())


# ---- What the device can do


def ceilings(preset: Preset, on: torch.device, runs: int, size: int, copied_bytes: int) -> Ceilings:
    """Square products in the preset's type and in FP8, and a copy (read and written)."""
    kind = getattr(torch, preset.precision)
    left, right = (torch.rand(size, size, device=on).to(kind) for _ in range(2))
    product = timed(lambda: lambda: left @ right, on, runs)
    small = [x.to(torch.float8_e4m3fn) for x in (left, right.t().contiguous())]
    one = torch.ones((), device=on)
    fp8 = timed(lambda: lambda: torch._scaled_mm(small[0], small[1].t(), one, one, out_dtype=kind), on, runs)
    source, target = (torch.ones(copied_bytes, dtype=torch.uint8, device=on) for _ in range(2))
    copy = timed(lambda: lambda: target.copy_(source), on, runs)
    assert product.seconds is not None
    assert copy.seconds is not None
    flops = 2 * size**3
    return Ceilings(
        device_name(on),
        flops / product.seconds,
        2 * copied_bytes / copy.seconds,
        f"measured: products of {size} in {preset.precision} (and e4m3fn); a copy of {copied_bytes >> 20} MiB",
        {} if fp8.seconds is None else {"MatMul": flops / fp8.seconds},
    )


def attention(
    heads: int, queries: int, keys: int, width: int, kind: torch.dtype, on: torch.device, runs: int
) -> Mapping[str, Timed]:
    """torch's attention kernels on one self-attention of a step, by name."""
    shapes = ((1, heads, queries, width), (1, heads, keys, width), (1, heads, keys, width))
    query, key, value = (torch.randn(shape, device=on).to(kind) for shape in shapes)

    def make(backend: SDPBackend) -> Work:
        def work() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value)

        return work

    return {backend.name.lower(): timed(lambda backend=backend: make(backend), on, runs) for backend in ATTENTIONS}  # type: ignore[misc]
