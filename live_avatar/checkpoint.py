"""Weights of a preset: from a folder of safetensors files, or drawn from the preset's fixed seed.

Parameter names are the official state dict's. A folder holds `dit.safetensors`, `vae.safetensors`,
`speech.safetensors` and `text.safetensors`; every tensor must be there, none may be left over. The
module knows no graphs. (Sharded official downloads and LoRA are not read yet.)
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from live_avatar.components import Networks, build_networks
from live_avatar.config import Preset
from live_avatar.errors import CheckpointError


def load_networks(preset: Preset, folder: Path | None = None) -> Networks:
    """Networks with the weights of `folder`; without one, with random weights of `preset.weight_seed`.

    Raises `CheckpointError` for a missing file, for missing, surplus or wrong-shaped tensors, and for a preset
    whose official files this version cannot read.
    """
    if preset.text.tokenizer != "bytes":
        raise CheckpointError(
            f"preset {preset.name} needs the official checkpoint and its tokenizer, which this version cannot read; "
            "use preset tiny."
        )
    networks = build_networks(preset)
    for index, (name, module) in enumerate(networks.parts().items()):
        if folder is None:
            _draw(module, seed=preset.weight_seed + index)
        else:
            _load(module, folder / f"{name}.safetensors")
        module.requires_grad_(False)
    return networks


def _load(module: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"checkpoint file {path} does not exist; expected a folder with {path.name} in it.")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}); fetch it again.") from error
    expected = module.state_dict()
    for problem, names in (
        ("lacks", expected.keys() - weights.keys()),
        ("has unknown", weights.keys() - expected.keys()),
    ):
        if names:
            raise CheckpointError(
                f"{path} {problem} {len(names)} tensors, such as {sorted(names)[0]!r}; is it of another preset?"
            )
    for name, tensor in expected.items():
        if tensor.shape != weights[name].shape:
            raise CheckpointError(
                f"{path}: tensor {name!r} has shape {list(weights[name].shape)}, expected {list(tensor.shape)}; "
                "is it of another preset?"
            )
    module.load_state_dict(weights)


def _draw(module: nn.Module, seed: int) -> None:
    """Random weights that keep activations of size about 1, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            parameter.copy_(_drawn(name, parameter, generator))


def _drawn(name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(parameter.shape, generator=generator)
    if name.endswith(("gamma", "original0")) or ("norm" in name and name.endswith("weight")):
        return 1 + 0.1 * noise
    if parameter.dim() < 2:
        return 0.1 * noise
    if parameter.dim() == 2 or name.endswith(("weight", "original1")):
        fan_in = parameter[0].numel()
        return noise * fan_in**-0.5
    return 0.3 * noise
