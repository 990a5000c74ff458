"""What each exported graph takes and gives: names, types, shapes. Stated once, read by all.

The exporter, the runtimes, the serving models and the tests read contracts here or in an artifacts folder's manifest,
which carries them along. A shape entry is a number or the name of a symbolic dimension, whose least, usual and greatest
value stand in `Contract.profiles` (TensorRT's optimization profiles).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import IntEnum
from functools import cache
from typing import Any

from live_avatar.config import (
    LATENT_CHANNELS,
    MOTION_LATENTS,
    PATCH,
    TEMPORAL_STRIDE,
    Preset,
    TAEConfig,
    VAEConfig,
)
from live_avatar.errors import ConfigError

FLOAT, INT64, UINT8 = "float32", "int64", "uint8"
BYTES: Mapping[str, int] = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "int64": 8,
    "uint8": 1,
}
"""Every type of a tensor, and the bytes of a number of it."""
Shape = tuple[int | str, ...]
Ranges = Mapping[str, tuple[int, int, int]]
"""Least, usual and greatest value of every symbolic dimension."""

DIT, BLOCK_TOKENS, SINK_TOKENS, TEXT = "dit", "dit_block_tokens", "dit_sink_tokens", "dit_text"
"""The transformer, and the small graphs that make its tokens and its text keys and values."""
BLOCK, SINK = "block", "sink"
"""Profiles of `dit`: the tokens of a noisy block, or those of a sink."""


DECODERS = ("vae_decoder_warm_up", "vae_decoder")
"""The VAE's decoder or the tiny one."""
WITH_ATTENTION = (
    "speech_encoder",
    "text_encoder",
    "vae_encoder",
    *DECODERS,
    DIT,
)
"""Components whose graphs have attentions, with the VAE's decoder."""


class Extent(IntEnum):
    """Which size of a symbolic dimension: an index into the entries of `Ranges`."""

    MIN = 0
    OPT = 1
    MAX = 2


@dataclass(frozen=True)
class GraphTensor:
    """One input or output: its name, numpy type name and shape.

    resident: it stays in the runtime's memory, as caches and the state of a stream do, so a runtime on a GPU never
    copies it to the host. transient: it is resident for one call, from the graph that makes it to the graph that takes
    it.
    """

    name: str
    dtype: str
    shape: Shape
    resident: bool = False
    transient: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in BYTES:
            raise ConfigError(f"{self.name} has type {self.dtype!r}; expected one of {', '.join(BYTES)}.")


@dataclass(frozen=True)
class Contract:
    """One component: inputs and outputs in order, and the ranges of its symbolic dimensions in every profile.

    A graph without symbolic dimensions has no profile. decomposable: why TensorRT may make several kernels of an
    attention of this graph; empty if each must become one fused kernel, without which no engine is built.
    """

    name: str
    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]
    profiles: Mapping[str, Ranges] = field(default_factory=dict)
    decomposable: str = ""

    def shape(self, spec: GraphTensor, extent: Extent, profile: str | None = None) -> tuple[int, ...]:
        """The shape with every symbolic dimension at that extent, in the first profile or the one named."""
        ranges = self.profiles[profile or next(iter(self.profiles))] if self.profiles else {}
        return tuple(ranges[d][extent] if isinstance(d, str) else d for d in spec.shape)

    def largest(self, spec: GraphTensor) -> int:
        """Most elements that the tensor has in any profile."""
        return max(math.prod(self.shape(spec, Extent.MAX, profile)) for profile in self.profiles or (None,))

    def to_dict(self) -> dict[str, Any]:
        specs = {
            side: [{**asdict(spec), "shape": list(spec.shape)} for spec in getattr(self, side)]
            for side in ("inputs", "outputs")
        }
        profiles = {name: {k: list(v) for k, v in ranges.items()} for name, ranges in self.profiles.items()}
        return {"name": self.name, **specs, "profiles": profiles, "decomposable": self.decomposable}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Contract:
        def specs(side: str) -> tuple[GraphTensor, ...]:
            return tuple(GraphTensor(**{**spec, "shape": tuple(spec["shape"])}) for spec in values[side])

        profiles = {
            name: {k: (v[0], v[1], v[2]) for k, v in ranges.items()} for name, ranges in values["profiles"].items()
        }
        return cls(values["name"], specs("inputs"), specs("outputs"), profiles, values["decomposable"])


def kv_names(prefix: str, layers: int) -> tuple[str, ...]:
    """Names of the keys and values of all layers: `prefix_k.0`, `prefix_v.0`, `prefix_k.1`, ..."""
    return tuple(f"{prefix}_{part}.{layer}" for layer in range(layers) for part in "kv")


@cache
def decoder_state_shapes(
    config: VAEConfig | TAEConfig, latent_height: int, latent_width: int
) -> tuple[tuple[int, ...], ...]:
    """Shapes of the slots of a stream through the decoder of that configuration, read off a dry run."""
    import torch  # here alone: a serving process reads shapes from the manifest and needs no torch

    from live_avatar.model.tae import TAE
    from live_avatar.model.vae import VAE

    with torch.device("meta"):
        decoder = TAE(config) if isinstance(config, TAEConfig) else VAE(config)
        latent = torch.empty(1, LATENT_CHANNELS, 1, latent_height, latent_width)
        _, state = decoder.to("meta").decode(latent, None)
    return tuple(tuple(slot.shape) for slot in state)


def _kv_specs(preset: Preset, prefix: str, tokens: int | str, dtype: str | None = None) -> tuple[GraphTensor, ...]:
    """Keys and values of all layers, in the precision if no other type is given."""
    dit = preset.dit
    shape = (1, dit.num_heads, tokens, dit.head_dim)
    names = kv_names(prefix, dit.num_layers)
    return tuple(GraphTensor(name, dtype or preset.precision, shape, resident=True) for name in names)


def _speech_encoder(preset: Preset) -> Contract:
    speech, stream = preset.speech, preset.stream
    block, most = stream.block_samples, stream.block_samples * stream.speech_window_blocks
    count = speech.feature_count
    return Contract(
        "speech_encoder",
        (GraphTensor("samples", FLOAT, (1, "samples")),),
        (GraphTensor("hidden", FLOAT, (preset.dit.audio_states, "features", speech.hidden_size)),),
        {"window": {"samples": (block, most, most), "features": (count(block), count(most), count(most))}},
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


def _decoder_states(preset: Preset, prefix: str) -> tuple[GraphTensor, ...]:
    shapes = decoder_state_shapes(preset.tae or preset.vae, preset.stream.latent_height, preset.stream.latent_width)
    return tuple(GraphTensor(f"{prefix}.{i}", preset.precision, shape, True) for i, shape in enumerate(shapes))


def _vae_encoder(preset: Preset) -> Contract:
    picture = GraphTensor("picture", FLOAT, (1, 3, 1, preset.stream.height, preset.stream.width))
    return Contract("vae_encoder", (picture,), (_motion_spec(preset),))


def _motion_spec(preset: Preset) -> GraphTensor:
    return GraphTensor("motion", FLOAT, _latent_shape(preset, MOTION_LATENTS))


def _vae_decoder_warm_up(preset: Preset) -> Contract:
    latents = GraphTensor("latents", FLOAT, _latent_shape(preset, preset.stream.decoder_warmup_latents))
    return Contract("vae_decoder_warm_up", (latents,), _decoder_states(preset, "new_state"))


def _vae_decoder(preset: Preset) -> Contract:
    stream = preset.stream
    frames = GraphTensor("frames", UINT8, (TEMPORAL_STRIDE, stream.height, stream.width, 3))
    return Contract(
        "vae_decoder",
        (
            GraphTensor("latents", FLOAT, _latent_shape(preset, 1)),
            *_decoder_states(preset, "state"),
        ),
        (frames, *_decoder_states(preset, "new_state")),
    )


def _token_spec(preset: Preset, frames: int | str, tokens: int | str) -> GraphTensor:
    return GraphTensor("tokens", FLOAT, (frames, tokens, preset.dit.dim), resident=True, transient=True)


def _dit_block_tokens(preset: Preset) -> Contract:
    stream = preset.stream
    latent = GraphTensor("latent", FLOAT, _latent_shape(preset, stream.frames_per_block))
    return Contract(BLOCK_TOKENS, (latent,), (_token_spec(preset, stream.frames_per_block, stream.frame_tokens),))


def _dit_sink_tokens(preset: Preset) -> Contract:
    latents = (
        GraphTensor("reference", FLOAT, _latent_shape(preset, 1)),
        _motion_spec(preset),
    )
    return Contract(SINK_TOKENS, latents, (_token_spec(preset, 1, preset.stream.sink_tokens),))


def _dit_text(preset: Preset) -> Contract:
    return Contract(TEXT, (_text_spec(preset),), _kv_specs(preset, "text", preset.dit.text_len))


def _dit(preset: Preset) -> Contract:
    dit, stream = preset.dit, preset.stream
    grid = ("frames", "frame_tokens")
    pairs = dit.head_dim // 2
    return Contract(
        DIT,
        (
            _token_spec(preset, *grid),
            GraphTensor("audio_local", FLOAT, (stream.speakers, "frames", dit.num_audio_token + 1, dit.dim)),
            GraphTensor("audio_global", FLOAT, (stream.speakers, "frames", dit.dim)),
            GraphTensor("audio_weight", FLOAT, (stream.speakers, *grid)),
            GraphTensor("modulation", FLOAT, (dit.num_layers, 6, dit.dim), resident=True),
            GraphTensor("head_modulation", FLOAT, (2, dit.dim), resident=True),
            GraphTensor("phase", FLOAT, (2, *grid, pairs)),
            GraphTensor("sink_turn", FLOAT, (2, "sink_tokens", pairs)),
            *_kv_specs(preset, "text", dit.text_len),
            *_kv_specs(preset, "sink", "sink_tokens"),
            *_kv_specs(preset, "history", "history_tokens", preset.history_dtype),
        ),
        (
            GraphTensor("patches", FLOAT, (*grid, PATCH * PATCH * LATENT_CHANNELS)),
            *_kv_specs(preset, "new", "tokens"),
        ),
        {
            BLOCK: _dit_profile(
                stream.frames_per_block,
                stream.frame_tokens,
                stream.sink_tokens,
                stream.past_blocks * stream.block_tokens,
            ),
            SINK: _dit_profile(1, stream.sink_tokens, 0, 0),
        },
    )


def _dit_profile(frames: int, frame_tokens: int, sink_tokens: int, history_tokens: int) -> Ranges:
    """All fixed but the history, which grows from nothing at the start of a session."""
    fixed = {
        "frames": frames,
        "frame_tokens": frame_tokens,
        "tokens": frames * frame_tokens,
        "sink_tokens": sink_tokens,
    }
    return {
        **{name: (size, size, size) for name, size in fixed.items()},
        "history_tokens": (0, history_tokens, history_tokens),
    }


def contracts(preset: Preset) -> dict[str, Contract]:
    """The contract of every component of a preset, by name."""
    makers: list[Callable[[Preset], Contract]] = [
        _speech_encoder,
        _audio_tokens,
        _text_encoder,
        _vae_encoder,
        _vae_decoder_warm_up,
        _vae_decoder,
        _dit_block_tokens,
        _dit_sink_tokens,
        _dit_text,
        _dit,
    ]
    made = [maker(preset) for maker in makers]
    return {contract.name: replace(contract, decomposable=_decomposable(preset, contract.name)) for contract in made}


def _decomposable(preset: Preset, component: str) -> str:
    """`Contract.decomposable` of a component. What has a fused kernel is what TensorRT-RTX 1.7 compiles."""
    if component not in WITH_ATTENTION or (preset.tae is not None and component in DECODERS):
        return ""
    if preset.precision == "float32" or (component == "text_encoder" and preset.precision == "float16"):
        return "there is no fused kernel in float32"
    if component.startswith("vae_"):
        return (
            f"one head of {preset.vae.dim * preset.vae.dim_mult[-1]} channels over one frame: fused kernels take heads "
            "of 12 to 256 channels, and at least two heads or frames"
        )
    return ""
