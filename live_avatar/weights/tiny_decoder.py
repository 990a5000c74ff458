"""The file of a tiny decoder: the package's own, or `taew2_1.safetensors` or `.pth` as the community publishes it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from live_avatar.assets import TINY_WEIGHTS
from live_avatar.config import LATENT_CHANNELS, TINY_DECODER, TAEConfig
from live_avatar.errors import CheckpointError, ConfigError
from live_avatar.weights.tensors import (
    Checkpoint,
    RenamedWeights,
    SafetensorsWeights,
    TorchFileWeights,
    Weights,
    network_shapes,
    validate_tensors,
)

TAKEN = "taew2_1.safetensors or taew2_1.pth of madebyollin/taehv, the decoder for the 16 latent channels of Wan 2.1"
FIRST, LAST = "decoder.1.weight", "decoder.22.weight"
GROWTHS = ("decoder.7.conv.weight", "decoder.13.conv.weight", "decoder.19.conv.weight")
WIDENINGS = ("decoder.8.weight", "decoder.14.weight", "decoder.20.weight")
ENCODER = "encoder."
SHIPPED = "tiny"
"""Stands for the file of the package."""
SHIPPED_FILE = TINY_WEIGHTS / "tae.safetensors"


def with_tiny_decoder(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """The checkpoint with a tiny decoder in the place of the VAE's; reads no tensor.

    path: the file, or `SHIPPED`. The file's encoder is left out. Raises `CheckpointError` for a file that is not whole,
    or is of another network, and for the package's own decoder with a VAE that is not the package's.
    """
    if path == Path(SHIPPED):
        path = _shipped(checkpoint)
    if not path.is_file():
        raise CheckpointError(
            f"decoder file {path} does not exist; give {TAKEN}; or the word {SHIPPED} for the package's "
            "own, of preset tiny."
        )
    stored: Weights = SafetensorsWeights(path) if path.suffix == ".safetensors" else TorchFileWeights(path)
    decoder = RenamedWeights(stored, {name: name for name in stored.shapes() if not name.startswith(ENCODER)})
    preset = dataclasses.replace(checkpoint.preset, tae=_config(decoder))
    try:
        validate_tensors(decoder, network_shapes(preset)[TINY_DECODER])
    except CheckpointError as error:
        raise CheckpointError(f"{error} Expected {TAKEN}.") from error
    return dataclasses.replace(checkpoint, preset=preset, parts={**checkpoint.parts, TINY_DECODER: decoder})


def _shipped(checkpoint: Checkpoint) -> Path:
    vae = checkpoint.parts["vae"]
    if list(vae.files) != [TINY_WEIGHTS / "vae.safetensors"]:
        raise CheckpointError(
            f"decoder {SHIPPED!r} decodes the latents of the package's own VAE, but this VAE is {vae.origin}; give a "
            "decoder that was trained with it, as `python -m training.run --stage decoder` does."
        )
    return SHIPPED_FILE


def _config(weights: Weights) -> TAEConfig:
    """The sizes that the tensors' shapes tell."""
    latents = _shape(weights, FIRST)[1]
    if latents != LATENT_CHANNELS:
        raise CheckpointError(
            f"{weights.origin} decodes {latents} latent channels, but the model's latents have {LATENT_CHANNELS}; give "
            f"{TAKEN}."
        )
    colours = _shape(weights, LAST)[0]
    if colours != 3:
        raise CheckpointError(
            f"{weights.origin} gives {colours} values for a pixel, expected 3: variants that shuffle pixels are not "
            f"taken; give {TAKEN}."
        )
    widths = [_shape(weights, FIRST)[0], *(_shape(weights, name)[0] for name in WIDENINGS)]
    grown = [_shape(weights, name)[0] for name in GROWTHS]
    try:
        return TAEConfig(tuple(widths), time_upscale=tuple(n // w for n, w in zip(grown, widths, strict=False)))
    except ConfigError as error:
        raise CheckpointError(f"{weights.origin} is another decoder: {error} Give {TAKEN}.") from error


def _shape(weights: Weights, name: str) -> tuple[int, ...]:
    shape = weights.shapes().get(name, ())
    if len(shape) != 4 or 0 in shape:
        found = f"has shape {list(shape)}" if shape else "is missing"
        raise CheckpointError(
            f"{weights.origin}: tensor {name!r} {found}, expected a convolution's of four dimensions; give {TAKEN}."
        )
    return shape
