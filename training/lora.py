"""Low-rank adapters in training: factors of frozen linears, and files with the official names (section 14).

y = W x + b + alpha / rank * B A x. `live_avatar.weights.lora` reads the files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from live_avatar.model.attention import Linear
from live_avatar.model.dit import CausalDiT
from live_avatar.model.linears import is_lora_target
from live_avatar.weights.lora import PREFIX
from training.checkpoints import write_whole
from training.config import LoRAConfig
from training.distributed import gathered

FACTOR = re.compile(r"\.lora_[AB]\.weight$")


class AdaptedLinear(Linear):
    """A linear with an adapter; the linear's own parameters are frozen. At first the result is the same."""

    def __init__(self, base: nn.Linear, settings: LoRAConfig, draw: torch.Generator) -> None:
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale = settings.alpha / settings.rank
        self.lora_A = nn.Linear(base.in_features, settings.rank, bias=False)
        self.lora_B = nn.Linear(settings.rank, base.out_features, bias=False)
        with torch.no_grad():
            self.lora_A.weight.normal_(std=base.in_features**-0.5, generator=draw)
            self.lora_B.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.scale * self.lora_B(self.lora_A(x))


def adapt(dit: CausalDiT, settings: LoRAConfig, draw: torch.Generator) -> None:
    """Adds an adapter to every target linear of the network and freezes all other parameters."""
    dit.requires_grad_(False)
    for name, linear in [(name, part) for name, part in dit.named_modules() if isinstance(part, Linear)]:
        if is_lora_target(name):
            parent, _, own = name.rpartition(".")
            setattr(dit.get_submodule(parent), own, AdaptedLinear(linear, settings, draw))


def _adapters(dit: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    return ((name, part) for name, part in dit.named_modules() if isinstance(part, AdaptedLinear))


def adapter_of(dit: nn.Module) -> dict[str, Tensor]:
    """The factors of an adapted network by official name; empty without adapters. All processes call it together."""
    state = gathered({name: tensor for name, tensor in dit.state_dict().items() if FACTOR.search(name)})
    return {f"{PREFIX}{name.removesuffix('.weight')}.default.weight": tensor for name, tensor in state.items()}


def merged(dit: nn.Module) -> dict[str, Tensor]:
    """The weights of a network by their official names, with its adapters merged.

    All processes call it together.
    """
    state = gathered(dict(dit.state_dict()))
    for name, part in _adapters(dit):
        down, up = (state[f"{name}.lora_{side}.weight"] for side in "AB")
        state[f"{name}.weight"] = state[f"{name}.weight"].float().addmm(up, down, alpha=part.scale)
    return {name: tensor for name, tensor in state.items() if not FACTOR.search(name)}


def save_adapter(path: Path, dit: nn.Module) -> None:
    """Writes the adapter of a network, with alpha, in the format of `live_avatar.weights.lora.LoRA`."""
    part = next(part for _, part in _adapters(dit))
    alpha = part.scale * part.lora_A.out_features
    tensors = {name: tensor.contiguous() for name, tensor in adapter_of(dit).items()}
    write_whole(path, lambda place: save_file(tensors, place, metadata={"lora_alpha": repr(alpha)}))
