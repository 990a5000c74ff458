"""What each exported graph takes and gives: names, types, shapes. Stated once, read by all.

The exporter, the runtimes, the serving models and the tests read contracts here or in an artifacts folder's manifest,
which carries them along. A shape entry is a number or the name of a symbolic dimension, whose least, usual and greatest
value stand in `Contract.ranges` (TensorRT's optimization profile).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import Any

from live_avatar.config import (
    LATENT_CHANNELS,
    MOTION_LATENTS,
    SPATIAL_STRIDE,
    TEMPORAL_STRIDE,
    Preset,
    VAEConfig,
)
from live_avatar.model.rope import pair_counts

FLOAT, INT64, UINT8 = "float32", "int64", "uint8"
Shape = tuple[int | str, ...]


class Extent(IntEnum):
    """Which size of a symbolic dimension: an index into the entries of `Contract.ranges`."""

    MIN = 0
    OPT = 1
    MAX = 2


@dataclass(frozen=True)
class GraphTensor:
    """One input or output: its name, numpy type name and shape.

    `resident`: it stays with the stage from call to call (caches, the state of a stream), so a runtime on a GPU
    keeps it there and never copies it to the host.
    """

    name: str
    dtype: str
    shape: Shape
    resident: bool = False


@dataclass(frozen=True)
class Contract:
    """One component: inputs and outputs in order, and the range of every symbolic dimension."""

    name: str
    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]
    ranges: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)

    def shape(self, spec: GraphTensor, extent: Extent) -> tuple[int, ...]:
        """The shape with every symbolic dimension at that extent."""
        return tuple(self.ranges[d][extent] if isinstance(d, str) else d for d in spec.shape)

    def to_dict(self) -> dict[str, Any]:
        specs = {
            side: [{**asdict(spec), "shape": list(spec.shape)} for spec in getattr(self, side)]
            for side in ("inputs", "outputs")
        }
        return {"name": self.name, **specs, "ranges": {k: list(v) for k, v in self.ranges.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Contract:
        def specs(side: str) -> tuple[GraphTensor, ...]:
            return tuple(GraphTensor(**{**spec, "shape": tuple(spec["shape"])}) for spec in values[side])

        ranges = {k: (v[0], v[1], v[2]) for k, v in values["ranges"].items()}
        return cls(values["name"], specs("inputs"), specs("outputs"), ranges)


def kv_names(prefix: str, layers: int) -> tuple[str, ...]:
    """Names of the keys and values of all layers: `prefix_k.0`, `prefix_v.0`, `prefix_k.1`, ..."""
    return tuple(f"{prefix}_{part}.{layer}" for layer in range(layers) for part in "kv")


def step_name(step: int) -> str:
    """Component of denoising step `step`, counted from 1."""
    return f"dit_step_{step}"


def vae_state_shapes(config: VAEConfig, latent_height: int, latent_width: int, part: str) -> list[tuple[int, ...]]:
    """Shapes of the slots of a stream through the VAE's `part`, "encode" or "decode", read off a dry run."""
    import torch  # here alone: a serving process reads shapes from the manifest and needs no torch

    from live_avatar.model.vae import VAE

    with torch.device("meta"):
        vae = VAE(config).to("meta")
        if part == "encode":
            frame = torch.empty(1, 3, 1, SPATIAL_STRIDE * latent_height, SPATIAL_STRIDE * latent_width)
            _, state = vae.encode(frame, None)
        else:
            _, state = vae.decode(torch.empty(1, config.z_dim, 1, latent_height, latent_width), None)
    return [tuple(slot.shape) for slot in state]


def _kv_specs(preset: Preset, prefix: str, tokens: int | str) -> tuple[GraphTensor, ...]:
    dit = preset.dit
    shape = (1, dit.num_heads, tokens, dit.head_dim)
    return tuple(GraphTensor(name, preset.precision, shape, resident=True) for name in kv_names(prefix, dit.num_layers))


def _speech_encoder(preset: Preset) -> Contract:
    speech, stream = preset.speech, preset.stream
    block, most = stream.block_samples, stream.block_samples * stream.speech_window_blocks
    count = speech.feature_count
    return Contract(
        "speech_encoder",
        (GraphTensor("samples", FLOAT, (1, "samples")),),
        (GraphTensor("hidden", FLOAT, (preset.dit.audio_states, "features", speech.hidden_size)),),
        {"samples": (block, most, most), "features": (count(block), count(most), count(most))},
    )


def _audio_specs(preset: Preset) -> tuple[GraphTensor, ...]:
    dit, frames = preset.dit, preset.stream.frames_per_block
    return (
        GraphTensor("audio_local", FLOAT, (frames, dit.num_audio_token + 1, dit.dim)),
        GraphTensor("audio_global", FLOAT, (frames, dit.dim)),
    )


def _audio_tokens(preset: Preset) -> Contract:
    dit = preset.dit
    states = GraphTensor("states", FLOAT, (dit.audio_states, dit.audio_dim, preset.stream.block_frames))
    return Contract("audio_tokens", (states,), _audio_specs(preset))


def _text_encoder(preset: Preset) -> Contract:
    dit = preset.dit
    tokens = (
        GraphTensor("token_ids", INT64, (1, dit.text_len)),
        GraphTensor("token_mask", INT64, (1, dit.text_len)),
    )
    return Contract("text_encoder", tokens, (_text_spec(preset),))


def _text_spec(preset: Preset) -> GraphTensor:
    return GraphTensor("text", FLOAT, (preset.dit.text_len, preset.dit.text_dim))


def _latent_shape(preset: Preset, frames: int) -> Shape:
    return (1, LATENT_CHANNELS, frames, preset.stream.latent_height, preset.stream.latent_width)


def _vae_states(preset: Preset, part: str, prefix: str) -> tuple[GraphTensor, ...]:
    stream = preset.stream
    shapes = vae_state_shapes(preset.vae, stream.latent_height, stream.latent_width, part)
    return tuple(GraphTensor(f"{prefix}.{i}", preset.precision, shape, True) for i, shape in enumerate(shapes))


def _vae_encoder(preset: Preset, first: bool) -> Contract:
    stream = preset.stream
    shape = (1, 3, 1 if first else TEMPORAL_STRIDE, stream.height, stream.width)
    return Contract(
        "vae_encoder_first" if first else "vae_encoder",
        (GraphTensor("frames", FLOAT, shape), *(() if first else _vae_states(preset, "encode", "state"))),
        (GraphTensor("latent", FLOAT, _latent_shape(preset, 1)), *_vae_states(preset, "encode", "new_state")),
    )


def _vae_decoder_first(preset: Preset) -> Contract:
    return Contract(
        "vae_decoder_first",
        (GraphTensor("latents", FLOAT, _latent_shape(preset, 1)),),
        _vae_states(preset, "decode", "new_state"),
    )


def _vae_decoder(preset: Preset) -> Contract:
    stream = preset.stream
    frames = GraphTensor("frames", UINT8, (stream.block_frames, stream.height, stream.width, 3))
    return Contract(
        "vae_decoder",
        (
            GraphTensor("latents", FLOAT, _latent_shape(preset, stream.frames_per_block)),
            *_vae_states(preset, "decode", "state"),
        ),
        (frames, *_vae_states(preset, "decode", "new_state")),
    )


def _dit_prefill(preset: Preset) -> Contract:
    return Contract(
        "dit_prefill",
        (
            GraphTensor("reference", FLOAT, _latent_shape(preset, 1)),
            GraphTensor("motion", FLOAT, _latent_shape(preset, MOTION_LATENTS)),
            _text_spec(preset),
        ),
        (
            *_kv_specs(preset, "text", preset.dit.text_len),
            *_kv_specs(preset, "sink", preset.stream.sink_tokens),
        ),
    )


def _dit_step(preset: Preset, step: int) -> Contract:
    stream = preset.stream
    pairs = pair_counts(preset.dit.head_dim)[0]
    latent = _latent_shape(preset, stream.frames_per_block)
    most = stream.past_blocks * stream.block_tokens
    return Contract(
        step_name(step),
        (
            GraphTensor("latent", FLOAT, latent),
            *_audio_specs(preset),
            GraphTensor("block_phase", FLOAT, (2, stream.frames_per_block, pairs)),
            GraphTensor("sink_phase", FLOAT, (2, 1, pairs)),
            *_kv_specs(preset, "text", preset.dit.text_len),
            *_kv_specs(preset, "sink", stream.sink_tokens),
            *_kv_specs(preset, "history", "history_tokens"),
        ),
        (GraphTensor("velocity", FLOAT, latent), *_kv_specs(preset, "block", stream.block_tokens)),
        {"history_tokens": (0, most, most)},
    )


def contracts(preset: Preset) -> dict[str, Contract]:
    """The contract of every component of a preset, by name."""
    makers: list[Callable[[Preset], Contract]] = [
        _speech_encoder,
        _audio_tokens,
        _text_encoder,
        lambda p: _vae_encoder(p, first=True),
        lambda p: _vae_encoder(p, first=False),
        _vae_decoder_first,
        _vae_decoder,
        _dit_prefill,
    ]
    made = [maker(preset) for maker in makers]
    made += [_dit_step(preset, step) for step in range(1, preset.stream.steps + 1)]
    return {contract.name: contract for contract in made}
