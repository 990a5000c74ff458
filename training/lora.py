"""Low-rank adapters in training: factors of frozen linears, and files with the official names (section 14).

y = W x + b + alpha / rank * B A x. A network may have several adapters, of which one at a time takes part.
`live_avatar.weights.lora` reads the files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from live_avatar.errors import CheckpointError
from live_avatar.model.attention import Linear
from live_avatar.model.dit import CausalDiT
from live_avatar.model.linears import is_lora_target
from live_avatar.weights.lora import PREFIX
from live_avatar.weights.tensors import SafetensorsWeights
from training.checkpoints import write_whole
from training.config import LoRAConfig
from training.distributed import fill, gathered, is_main

FACTOR = re.compile(r"\.lora_[AB]\.")
ADAPTER = "lora.safetensors"
GENERATOR = "dit"
"""Name of the generator's adapter."""


class Switch:
    """The adapter of a network that takes part: its name, or None for the base alone."""

    def __init__(self, name: str | None) -> None:
        self.name = name

    @contextmanager
    def to(self, name: str | None) -> Iterator[None]:
        """Inside, the adapter of that name takes part."""
        before, self.name = self.name, name
        try:
            yield
        finally:
            self.name = before


class AdaptedLinear(Linear):
    """A frozen linear with adapters, whose factors are float32 and computed in the linear's type."""

    def __init__(self, base: nn.Linear, settings: LoRAConfig, names: Sequence[str], switch: Switch) -> None:
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.alpha, self.scale = settings.alpha, settings.alpha / settings.rank
        self._switch = switch
        device = base.weight.device
        sizes = {"A": (base.in_features, settings.rank), "B": (settings.rank, base.out_features)}
        self.lora_A, self.lora_B = (
            nn.ModuleDict({name: nn.Linear(*sizes[side], bias=False, device=device) for name in names}) for side in "AB"
        )

    def forward(self, x: Tensor) -> Tensor:
        plain, name = super().forward(x), self._switch.name
        if name is None:
            return plain
        down, up = self.factors(name)
        return plain + self.scale * F.linear(F.linear(x.to(plain.dtype), down.to(plain.dtype)), up.to(plain.dtype))

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank] of an adapter."""
        return self.lora_A.get_submodule(name).weight, self.lora_B.get_submodule(name).weight  # type: ignore[return-value]


class Adapter(nn.Module):
    """The factors of one adapter of a network, to be trained and saved alone."""

    def __init__(self, dit: CausalDiT, name: str) -> None:
        super().__init__()
        for place, part in _adapted(dit):
            sides = {side: getattr(part, f"lora_{side}").get_submodule(name) for side in "AB"}
            self.add_module(place.replace(".", "/"), nn.ModuleDict(sides))
        self.alpha = next(part for _, part in _adapted(dit)).alpha


def adapt(dit: CausalDiT, settings: LoRAConfig, names: Sequence[str] = (GENERATOR,)) -> Switch:
    """Adds adapters to every target linear of the network and freezes all other parameters.

    The factors are on the network's device, and have no values until `draw_factors`. The first adapter takes part.
    """
    dit.requires_grad_(False)
    switch = Switch(names[0])
    for name, linear in [(name, part) for name, part in dit.named_modules() if isinstance(part, Linear)]:
        if is_lora_target(name):
            parent, _, own = name.rpartition(".")
            setattr(dit.get_submodule(parent), own, AdaptedLinear(linear, settings, names, switch))
    return switch


@torch.no_grad()
def draw_factors(dit: CausalDiT, draw: torch.Generator, name: str = GENERATOR) -> None:
    """A new adapter: A is drawn, and B is zero, so the network is as without it."""
    for _, part in _adapted(dit):
        down, up = part.factors(name)
        fill(down, torch.randn(down.shape, generator=draw) * part.in_features**-0.5)
        fill(up, torch.zeros(up.shape))


def _adapted(dit: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    return ((name, part) for name, part in dit.named_modules() if isinstance(part, AdaptedLinear))


def merged(dit: nn.Module) -> dict[str, Tensor]:
    """The weights of a network by their official names, with its generator's adapter merged.

    All processes call it together.
    """
    state = gathered(dict(dit.state_dict()))
    for name, part in _adapted(dit):
        down, up = (state[f"{name}.lora_{side}.{GENERATOR}.weight"] for side in "AB")
        state[f"{name}.weight"] = state[f"{name}.weight"].float().addmm(up, down, alpha=part.scale)
    return {name: tensor for name, tensor in state.items() if not FACTOR.search(name)}


def official_name(key: str) -> str:
    """The name in a file for a tensor of an `Adapter`'s state, such as `blocks/0/self_attn/q.A.weight`."""
    place, side, _ = key.rsplit(".", 2)
    return f"{PREFIX}{place.replace('/', '.')}.lora_{side}.default.weight"


def save_adapter(path: Path, adapter: Adapter) -> None:
    """Writes an adapter, with alpha, in the format of `live_avatar.weights.lora.LoRA`.

    All processes call it together, and the first one writes. Errors as `write_whole`.
    """
    state = gathered(dict(adapter.state_dict()))
    tensors = {official_name(key): tensor.cpu().contiguous() for key, tensor in state.items()}
    metadata = {"lora_alpha": repr(adapter.alpha)}
    if is_main():
        write_whole(path, lambda place: save_file(tensors, place, metadata=metadata))


@torch.no_grad()
def load_adapter(path: Path, adapter: Adapter) -> None:
    """Fills an adapter from a file of `save_adapter`. Raises `CheckpointError` for another shape or alpha."""
    file = SafetensorsWeights(path)
    held = {official_name(key): tensor for key, tensor in adapter.state_dict().items()}
    _check(file.shapes(), {name: tuple(tensor.shape) for name, tensor in held.items()}, path)
    alpha = float(file.metadata.get("lora_alpha", "nan"))
    if alpha != adapter.alpha:
        raise CheckpointError(
            f"{path} has alpha {alpha}, but this run has {adapter.alpha}; make [lora] alpha the same."
        )
    for name, tensor in held.items():
        fill(tensor, file.read(name))


def _check(given: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], path: Path) -> None:
    for name in sorted(given.keys() | expected.keys()):
        if given.get(name) != expected.get(name):
            raise CheckpointError(
                f"{path}: {name!r} has shape {given.get(name)}, expected {expected.get(name)}; is it of another "
                "checkpoint, or is [lora] rank another one?"
            )
