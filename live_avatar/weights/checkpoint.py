"""From files (or a seed) to networks with weights.

A checkpoint folder is the official download (`official.py`), or four files of the project's own, `dit.safetensors`,
`vae.safetensors`, `speech.safetensors` and `text.safetensors`, with the official parameter names. Every tensor must be
there, none may be left over. Without a folder networks of the tiny preset's sizes have the weights that the package
ships, and others are drawn from the preset's seed. A LoRA is merged on the way in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from live_avatar.assets import TINY_WEIGHTS
from live_avatar.config import NETWORK_NAMES, TINY, Preset
from live_avatar.errors import CheckpointError
from live_avatar.model.networks import Networks, meta_networks, replace_parameters
from live_avatar.weights.lora import LoRA, MergedWeights
from live_avatar.weights.official import is_official, open_official
from live_avatar.weights.tensors import (
    Checkpoint,
    RandomWeights,
    SafetensorsWeights,
    Weights,
    network_shapes,
    validate_tensors,
)

# What the modulation of a timestep is made of (spec section 3, steps 2, 4, 5).
MODULATION = ("time_embedding", "time_projection", "modulation")


def open_checkpoint(preset: Preset | None = None, folder: Path | None = None, lora: LoRA | None = None) -> Checkpoint:
    """Finds and validates every tensor; reads none.

    The preset may be left out: then it is the one that an official folder describes, or `TINY`. Raises
    `CheckpointError` for a missing file, for missing, surplus or wrong-shaped tensors, and for a preset whose
    networks are not those of the folder.
    """
    if folder is not None and not folder.is_dir():
        fault = "is not a folder" if folder.exists() else "does not exist"
        raise CheckpointError(f"checkpoint {folder} {fault}; give the folder that holds the weights.")
    if folder is not None and is_official(folder):
        checkpoint = _as_preset(open_official(folder), preset, folder)
    else:
        checkpoint = _own(preset or TINY, folder)
    if lora is None:
        return checkpoint
    return dataclasses.replace(
        checkpoint, parts={**checkpoint.parts, "dit": MergedWeights(checkpoint.parts["dit"], lora)}
    )


def _as_preset(found: Checkpoint, wanted: Preset | None, folder: Path) -> Checkpoint:
    """The checkpoint under the wanted preset, if its networks are the same."""
    if wanted is None:
        return found
    for part in NETWORK_NAMES:
        ours, theirs = getattr(wanted, part), getattr(found.preset, part)
        for field in dataclasses.fields(ours):
            expected, value = getattr(ours, field.name), getattr(theirs, field.name)
            if expected != value:
                raise CheckpointError(
                    f"{folder} has {part} {field.name} {value}, but preset {wanted.name} has {expected}; leave "
                    "--preset out to take the sizes from the folder."
                )
    return dataclasses.replace(found, preset=wanted)


def _own(preset: Preset, folder: Path | None) -> Checkpoint:
    if preset.text.tokenizer != "bytes":
        raise CheckpointError(
            f"preset {preset.name} needs the official checkpoint and its tokenizer; give the folder with --checkpoint, "
            "or make one with random weights: python -m export.synthetic --help."
        )
    if folder is not None and not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"checkpoint {folder} has neither the official files (config.json and others) nor dit.safetensors; give "
            "the folder that holds the weights."
        )
    folder = folder or _shipped(preset)
    parts: dict[str, Weights] = {}
    for index, (name, shapes) in enumerate(network_shapes(preset).items()):
        if folder is None:
            parts[name] = RandomWeights(shapes, preset.weight_seed + index)
        else:
            parts[name] = SafetensorsWeights(folder / f"{name}.safetensors")
            validate_tensors(parts[name], shapes)
    return Checkpoint(preset, parts)


def _shipped(preset: Preset) -> Path | None:
    """The weights that the package has for a preset's networks: streams of every size share them."""
    trained = all(getattr(preset, part) == getattr(TINY, part) for part in (*NETWORK_NAMES, "weight_seed"))
    return TINY_WEIGHTS if trained else None


def load_networks(checkpoint: Checkpoint, only: Sequence[str] | None = None) -> Networks:
    """Networks with their weights in memory, in the types of the preset.

    only: names of the parts that get their weights; the others stay on the meta device. None is all.
    """
    networks = meta_networks(checkpoint.preset)
    for part, network in networks.parts().items():
        if only is None or part in only:
            _fill(network, checkpoint.parts[part])
    return networks


def modulation_networks(checkpoint: Checkpoint) -> Networks:
    """Networks on the meta device, but for what the modulation of a timestep is made of: that has its weights."""
    networks = meta_networks(checkpoint.preset)
    _fill(networks.dit, checkpoint.parts["dit"], MODULATION)
    return networks


def _fill(network: nn.Module, weights: Weights, only: Sequence[str] | None = None) -> None:
    def filled(name: str, parameter: Tensor) -> Tensor:
        wanted = only is None or any(part in only for part in name.split("."))
        return weights.read(name).to(parameter.dtype) if wanted else parameter

    replace_parameters(network, filled)
