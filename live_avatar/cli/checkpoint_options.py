"""The options of `generate` and `export` that choose a checkpoint: networks, weights, size and schedule."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from live_avatar.cli.options import FILE, Integer, combined
from live_avatar.config import KV_CACHE_DTYPES, MAX_SPEAKERS, PRECISIONS, PRESETS, Preset, StreamConfig, preset

if TYPE_CHECKING:
    from live_avatar.weights.tensors import Checkpoint

# Networks, weights and size; None keeps the value of the preset.
model_options = combined(
    click.option(
        "--like",
        type=FILE,
        help="Take the aspect ratio from this picture: multiples of 64 pixels, within the preset's area.",
    ),
    click.option("--width", type=Integer(min=1), help="Width of the video in pixels, a multiple of 16."),
    click.option("--height", type=Integer(min=1), help="Height of the video in pixels, a multiple of 16."),
    click.option(
        "--decoder",
        type=FILE,
        help="A tiny decoder in the place of the VAE's, much cheaper and softer: the word tiny for the package's own, "
        "of preset tiny; taew2_1.safetensors or taew2_1.pth for the released model.",
    ),
    click.option(
        "--kv-cache-dtype",
        type=click.Choice(list(KV_CACHE_DTYPES)),
        help="Type of the keys and values of past blocks; default: that of --precision. fp8: one byte a number.",
    ),
    click.option("--precision", type=click.Choice(PRECISIONS), help="Type of large weights, activations and caches."),
    click.option(
        "--lora-alpha", type=float, help="The adapter's alpha, if the file does not contain it (64 for the release)."
    ),
    click.option("--lora", type=FILE, help="Adapter (safetensors) to merge into the transformer's weights."),
    click.option(
        "--checkpoint",
        type=FILE,
        help="Folder with the weights, such as the official download; default: the package's own, or random weights.",
    ),
    click.option(
        "--preset",
        "preset_name",
        type=click.Choice(sorted(PRESETS)),
        help="Model configuration; default: the one that --checkpoint describes, or tiny.",
    ),
)


def _numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    try:
        return None if value is None else tuple(float(word) for word in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a list of numbers, such as 1,0.5,0") from error


# Stream settings; None keeps the value of the preset.
stream_options = combined(
    click.option(
        "--speakers",
        type=Integer(1, MAX_SPEAKERS),
        help="People in the picture, each with a mask and speech of its own.",
    ),
    click.option(
        "--lookahead-ms",
        type=Integer(min=0),
        help="Future speech that a frame may depend on, a multiple of 40; delays the video by the same time.",
    ),
    click.option(
        "--sink-update-block",
        type=Integer(min=0),
        help="First block that attends to the model's own first frame: 2 is the paper's Algorithm 4, 5 costs no "
        "wait in the pipeline, 0 never.",
    ),
    click.option("--steps", type=Integer(min=1), help="Denoising steps, using the released schedule for that count."),
    click.option(
        "--sigmas",
        callback=_numbers,
        help="Noise levels instead of --steps, one more than the steps: from at most 1 down to 0, such as "
        "1,0.8577,0.6022,0.",
    ),
    click.option("--drop-idle-step", is_flag=True, help="Drop the near-idle last step; saves one GPU."),
)


def chosen_checkpoint(
    preset_name: str | None,
    checkpoint: Path | None,
    lora: Path | None,
    lora_alpha: float | None,
    precision: str | None,
    height: int | None,
    width: int | None,
    like: Path | None,
    decoder: Path | None = None,
    kv_cache_dtype: str | None = None,
    **stream: Any,
) -> Checkpoint:
    """Opens the checkpoint that `model_options` and `stream_options` select."""
    from live_avatar.weights.checkpoint import open_checkpoint
    from live_avatar.weights.lora import LoRA

    if lora is None and lora_alpha is not None:
        raise click.UsageError("--lora-alpha requires --lora; give the adapter's file")
    found = open_checkpoint(
        None if preset_name is None else preset(preset_name),
        checkpoint,
        None if lora is None else LoRA(lora, alpha=lora_alpha),
    )
    if decoder is not None:
        from live_avatar.weights.tiny_decoder import with_tiny_decoder

        found = with_tiny_decoder(found, decoder)
    size = _size(found.preset, height, width, like)
    chosen = found.preset.with_stream(**size, **_stream_changes(found.preset.stream, **stream))
    chosen = chosen.with_precision(precision or chosen.precision)
    chosen = chosen.with_kv_cache_dtype(kv_cache_dtype or chosen.kv_cache_dtype)
    return dataclasses.replace(found, preset=chosen)


def _size(chosen: Preset, height: int | None, width: int | None, like: Path | None) -> dict[str, int]:
    if like is not None:
        from live_avatar.inputs.image import area_size, picture_size
        from live_avatar_client.media import read_image_bytes

        if height is not None or width is not None:
            raise click.UsageError("--like sets height and width; leave --height and --width out")
        area = chosen.stream.height * chosen.stream.width
        height, width = area_size(*picture_size(read_image_bytes(like)), area)
    given = {"height": height, "width": width}
    return {name: value for name, value in given.items() if value is not None}


def _stream_changes(
    stream: StreamConfig,
    speakers: int | None,
    lookahead_ms: int | None,
    sink_update_block: int | None,
    steps: int | None,
    sigmas: tuple[float, ...] | None,
    drop_idle_step: bool,
) -> dict[str, Any]:
    if sum((steps is not None, sigmas is not None, drop_idle_step)) > 1:
        raise click.UsageError("--steps, --sigmas and --drop-idle-step exclude each other; give one of them")
    changes: dict[str, Any] = {}
    if speakers is not None:
        changes["speakers"] = speakers
    if lookahead_ms is not None:
        changes["lookahead_ms"] = lookahead_ms
    if sink_update_block is not None:
        changes["sink_update_block"] = sink_update_block or None
    if steps is not None:
        changes |= {"steps": steps, "sigmas": None}
    if sigmas is not None:
        changes |= {"steps": len(sigmas) - 1, "sigmas": sigmas}
    if drop_idle_step:
        from live_avatar.model.schedule import without_idle_step

        shorter = without_idle_step(stream)
        changes |= {"steps": shorter.steps, "sigmas": shorter.sigmas}
    return changes
