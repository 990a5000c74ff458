"""Every size of the system, in frozen dataclasses; everything else is derived from them.

`TINY` runs on a laptop's CPU; `S2V_14B` is the released model (spec sections 1, 11). The module
knows no torch, no files and no server.

Legend of the shapes used in the whole package: `B` batch (always 1), `F` latent frames of a block,
`C` channels, `h w` latent height and width, `L` tokens, `N` heads, `D` head width, `S` tokens of one
latent frame, `A` width of a speech feature, `K` speech-encoder states.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from live_avatar.errors import ConfigError

SAMPLE_RATE_HZ = 16_000
FPS = 25
SAMPLES_PER_FRAME = SAMPLE_RATE_HZ // FPS
LATENT_CHANNELS = 16
SPATIAL_STRIDE = 8  # pixels per latent pixel
TEMPORAL_STRIDE = 4  # video frames per latent frame
PATCH = 2  # latent pixels per token side
PRECISIONS = ("float32", "float16", "bfloat16")
KV_CACHE_DTYPES: Mapping[str, str] = {"fp8": "float8_e4m3fn"}
"""Types that a ring may have beside the precision: name of the option, type name of the contracts."""
NETWORK_NAMES = ("dit", "vae", "speech", "text")
"""The networks of every preset: fields of `Preset` and of `Networks`, parts of a checkpoint."""
TINY_DECODER = "tae"
"""The same of the network that a preset may have in the place of the VAE's decoder."""
MAX_SPEAKERS = 4
KNOWN_AVATARS = 16  # pictures with prompts whose work a generator remembers


@dataclass(frozen=True)
class PackingGroup:
    """Motion latents that one convolution of the frame packer turns into tokens; its stride equals its kernel.

    positions: temporal position of each token row, oldest first, relative to the first frame of the video.
    """

    kernel: tuple[int, int, int]
    positions: tuple[int, ...]

    @property
    def latents(self) -> int:
        """Latent frames that the group covers."""
        return self.kernel[0] * len(self.positions)

    def grid(self, latent_height: int, latent_width: int) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return latent_height // self.kernel[1], latent_width // self.kernel[2]


FRAME_PACKING = (
    PackingGroup((1, 2, 2), (-1,)),
    PackingGroup((2, 4, 4), (-3,)),
    PackingGroup((4, 8, 8), (-19, -14, -9, -4)),
)
"""Groups of the frame packer from the newest motion latent to the oldest (spec section 6)."""
MOTION_LATENTS = sum(group.latents for group in FRAME_PACKING)  # 19


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of the causal diffusion transformer and its audio encoder (spec section 2)."""

    dim: int
    num_heads: int
    num_layers: int
    ffn_dim: int
    text_dim: int
    text_len: int
    audio_dim: int
    audio_states: int
    audio_inject_layers: tuple[int, ...]
    num_audio_token: int = 4
    freq_dim: int = 256
    in_dim: int = LATENT_CHANNELS
    cond_dim: int = LATENT_CHANNELS
    eps: float = 1e-6

    def __post_init__(self) -> None:
        _require(
            self.dim % self.num_heads == 0,
            f"dim {self.dim} is not a multiple of {self.num_heads} heads; change one.",
        )
        _require(
            self.head_dim % 2 == 0,
            f"head width {self.head_dim} is odd, but RoPE turns pairs; make dim/heads even.",
        )
        _require(self.dim % 4 == 0, f"dim {self.dim} is not a multiple of 4, which the audio encoder needs.")
        _require(
            self.freq_dim % 2 == 0,
            f"freq_dim {self.freq_dim} is odd; it holds cosines and sines in equal number.",
        )
        layers = self.audio_inject_layers
        _require(
            list(layers) == sorted(set(layers)) and all(0 <= i < self.num_layers for i in layers),
            f"audio_inject_layers {layers} must be ascending numbers below {self.num_layers} layers.",
        )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the causal video VAE (spec section 13)."""

    dim: int
    z_dim: int = LATENT_CHANNELS
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)

    def __post_init__(self) -> None:
        _require(
            len(self.temporal_downsample) == len(self.dim_mult) - 1,
            f"temporal_downsample has {len(self.temporal_downsample)} entries; dim_mult {self.dim_mult} needs "
            f"{len(self.dim_mult) - 1}.",
        )


@dataclass(frozen=True)
class TAEConfig:
    """Sizes of the tiny decoder, by default those of the community's `taew2_1`.

    channels: widths from the latents to the frames; each but the last is followed by twice the height and width, and by
    `time_upscale` times the frames.
    """

    channels: tuple[int, ...] = (256, 128, 64, 64)
    z_dim: int = LATENT_CHANNELS
    time_upscale: tuple[int, ...] = (1, 2, 2)
    memory_blocks: int = 3

    def __post_init__(self) -> None:
        sides, frames = 2 ** len(self.time_upscale), math.prod(self.time_upscale)
        _require(
            len(self.channels) == len(self.time_upscale) + 1,
            f"channels {self.channels} are {len(self.channels)} widths; time_upscale {self.time_upscale} needs "
            f"{len(self.time_upscale) + 1}.",
        )
        _require(
            (sides, frames) == (SPATIAL_STRIDE, TEMPORAL_STRIDE),
            f"time_upscale {self.time_upscale} makes {frames} frames of {sides}x{sides} pixels of a latent; expected "
            f"{TEMPORAL_STRIDE} frames of {SPATIAL_STRIDE}x{SPATIAL_STRIDE}.",
        )


@dataclass(frozen=True)
class SpeechEncoderConfig:
    """Sizes of the wav2vec2 speech encoder, under the names of `transformers.Wav2Vec2Config`."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    conv_dim: tuple[int, ...]
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)

    def feature_count(self, samples: int) -> int:
        """Number of 50 Hz features that the convolutions make of `samples` samples."""
        for kernel, stride in zip(self.conv_kernel, self.conv_stride, strict=True):
            samples = (samples - kernel) // stride + 1
        return samples


@dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of the UMT5 text encoder, under the names of `transformers.UMT5Config`."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    tokenizer: str = "umt5"  # "umt5": the official sentencepiece folder; "bytes": UTF-8 bytes, no file


def _check_sigmas(sigmas: tuple[float, ...], steps: int) -> None:
    falling = all(a > b for a, b in pairwise(sigmas))
    _require(
        len(sigmas) >= 2 and falling and sigmas[0] <= 1.0 and sigmas[-1] == 0.0,
        f"sigmas {sigmas} must fall from at most 1 to exactly 0; give at least two.",
    )
    _require(
        len(sigmas) == steps + 1,
        f"sigmas {sigmas} are of {len(sigmas) - 1} steps, but steps is {steps}; give one value more than there are "
        "steps.",
    )


@dataclass(frozen=True)
class StreamConfig:
    """How a stream runs: geometry, schedule, caches, sink and speech window."""

    height: int
    width: int
    steps: int = 4
    schedule_shift: float = 3.0
    sigmas: tuple[float, ...] | None = None
    """Noise levels before each step and after the last, which is 0; None takes the released schedule of `steps`."""
    frames_per_block: int = 3
    window_blocks: int = 4
    sink_distance: int = 30
    sink_update_block: int | None = 5
    """First block (counted from 1, as in the paper) that sees the replaced sink: 2 is Algorithm 4, steps + 1 costs
    no bubble in the pipeline and is what the released code does, None keeps the reference image."""
    decoder_warmup_latents: int = 7
    """Motion latents decoded (and thrown away) before block 1, so that the first frame has a past (spec section 13)."""
    speech_window_blocks: int = 10
    """Blocks of speech, the current one included, that the speech encoder sees."""
    lookahead_ms: int = 0
    """Future speech that a frame may depend on; delays the video by as much. A multiple of one frame, 40 ms."""
    speakers: int = 1
    """People in one picture whose mouths move each to its own speech."""

    def __post_init__(self) -> None:
        side = SPATIAL_STRIDE * PATCH
        for name, value in (("height", self.height), ("width", self.width)):
            _require(
                value > 0 and value % side == 0,
                f"{name} {value} is not a positive multiple of {side} pixels; a token covers {side}x{side}.",
            )
        smallest = FRAME_PACKING[-1].kernel[1] * SPATIAL_STRIDE
        _require(
            min(self.height, self.width) >= smallest,
            f"picture {self.width}x{self.height} is below {smallest} pixels a side, the packer's largest kernel.",
        )
        if self.sigmas is not None:
            _check_sigmas(self.sigmas, self.steps)
        _require(
            1 <= self.speakers <= MAX_SPEAKERS,
            f"speakers is {self.speakers}; one picture has 1 to {MAX_SPEAKERS}.",
        )
        _require(self.steps >= 1, f"steps is {self.steps}; at least one denoising step is needed.")
        _require(self.schedule_shift > 0, f"schedule_shift is {self.schedule_shift}; it must be above 0.")
        _require(
            self.window_blocks >= 2,
            f"window_blocks is {self.window_blocks}; 2 is the least (one past block).",
        )
        _require(
            4 <= self.sink_distance <= 30,
            f"sink_distance {self.sink_distance} is outside 4..30, the range of training (spec section 4).",
        )
        _require(
            self.sink_update_block is None or self.sink_update_block >= 2,
            f"sink_update_block {self.sink_update_block} must be None or at least 2: the sink comes from block 1.",
        )
        _require(
            self.frames_per_block >= 1,
            f"frames_per_block is {self.frames_per_block}; at least 1 latent frame is needed.",
        )
        _require(
            self.speech_window_blocks >= 1,
            f"speech_window_blocks is {self.speech_window_blocks}; at least 1 is needed.",
        )
        frame_ms = 1000 // FPS
        most_ms = (self.speech_window_blocks - 1) * self.block_frames * frame_ms
        _require(
            0 <= self.lookahead_ms <= most_ms and self.lookahead_ms % frame_ms == 0,
            f"lookahead_ms {self.lookahead_ms} must be a multiple of one frame, {frame_ms} ms, and at most {most_ms} "
            f"with a window of {self.speech_window_blocks} blocks.",
        )
        _require(
            1 <= self.decoder_warmup_latents <= MOTION_LATENTS,
            f"decoder_warmup_latents {self.decoder_warmup_latents} must be 1 to {MOTION_LATENTS}.",
        )

    @property
    def latent_height(self) -> int:
        return self.height // SPATIAL_STRIDE

    @property
    def latent_width(self) -> int:
        return self.width // SPATIAL_STRIDE

    @property
    def frame_tokens(self) -> int:
        """Tokens of one latent frame, S."""
        return math.prod(self.token_grid)

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of tokens of one latent frame."""
        return self.latent_height // PATCH, self.latent_width // PATCH

    @property
    def block_tokens(self) -> int:
        return self.frames_per_block * self.frame_tokens

    @property
    def sink_tokens(self) -> int:
        """Tokens of the sink: reference and packed motion frames (spec section 6)."""
        motion = sum(
            len(group.positions) * math.prod(group.grid(self.latent_height, self.latent_width))
            for group in FRAME_PACKING
        )
        return self.frame_tokens + motion

    @property
    def past_blocks(self) -> int:
        """Blocks of history beside the current one."""
        return self.window_blocks - 1

    @property
    def block_frames(self) -> int:
        """Video frames of one block."""
        return self.frames_per_block * TEMPORAL_STRIDE

    @property
    def block_samples(self) -> int:
        return self.block_frames * SAMPLES_PER_FRAME

    @property
    def lookahead_frames(self) -> int:
        return self.lookahead_ms * FPS // 1000

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Shape of one block's latents, [C, F, h, w]."""
        return (LATENT_CHANNELS, self.frames_per_block, self.latent_height, self.latent_width)


@dataclass(frozen=True)
class Preset:
    """One named system: its networks and how its stream runs."""

    name: str
    dit: DiTConfig
    vae: VAEConfig
    speech: SpeechEncoderConfig
    text: TextEncoderConfig
    stream: StreamConfig
    tae: TAEConfig | None = None
    """The tiny decoder; without it the VAE's own decodes."""
    weight_seed: int = field(default=20_26)
    """Seed of the random weights of a preset without a checkpoint; the package has trained weights for `TINY`."""
    precision: str = "float32"
    """Data type of the transformer's large linears, the VAE and the caches; the text encoder has it unless it is
    float16. The transformer's residual stream, norms, modulation and head, and both audio networks, are always float32
    (spec section 16)."""
    kv_cache_dtype: str | None = None
    """Type of the keys and values of past blocks, a name of `KV_CACHE_DTYPES`; None is the precision. Sink, text and
    the current block have the precision in any case."""

    def __post_init__(self) -> None:
        _require(
            self.precision in PRECISIONS,
            f"precision {self.precision!r} is unknown; choose one of {', '.join(PRECISIONS)}.",
        )
        _require(
            self.kv_cache_dtype is None or self.kv_cache_dtype in KV_CACHE_DTYPES,
            f"kv_cache_dtype {self.kv_cache_dtype!r} is unknown; choose one of {', '.join(KV_CACHE_DTYPES)}, or leave "
            "it out.",
        )
        _require(
            self.dit.audio_dim == self.speech.hidden_size
            and self.dit.audio_states == self.speech.num_hidden_layers + 1,
            f"the DiT takes {self.dit.audio_states} speech states of width {self.dit.audio_dim}; the speech encoder "
            f"gives {self.speech.num_hidden_layers + 1} of width {self.speech.hidden_size}.",
        )
        _require(
            self.dit.text_dim == self.text.d_model,
            f"the DiT takes text of width {self.dit.text_dim}; the text encoder gives {self.text.d_model}.",
        )

    @property
    def history_dtype(self) -> str:
        """Type of the keys and values of past blocks, as contracts name it."""
        return self.precision if self.kv_cache_dtype is None else KV_CACHE_DTYPES[self.kv_cache_dtype]

    def with_stream(self, **changes: Any) -> Preset:
        """The same preset with other fields of its `StreamConfig`."""
        return dataclasses.replace(self, stream=dataclasses.replace(self.stream, **changes))

    def with_precision(self, precision: str) -> Preset:
        """The same preset with weights, activations and caches of another type."""
        return dataclasses.replace(self, precision=precision)

    def with_kv_cache_dtype(self, dtype: str | None) -> Preset:
        """The same preset with keys and values of past blocks of another type."""
        return dataclasses.replace(self, kv_cache_dtype=dtype)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for the manifest of an artifacts folder."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preset:
        """Inverse of `to_dict`, through JSON (where tuples have become lists)."""
        parts = {
            "dit": DiTConfig,
            "vae": VAEConfig,
            "tae": TAEConfig,
            "speech": SpeechEncoderConfig,
            "text": TextEncoderConfig,
            "stream": StreamConfig,
        }
        kwargs = {
            name: parts[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})
            if name in parts and value is not None
            else value
            for name, value in values.items()
        }
        return cls(**kwargs)


TINY = Preset(
    name="tiny",
    dit=DiTConfig(
        dim=128,
        num_heads=4,
        num_layers=6,
        ffn_dim=384,
        text_dim=64,
        text_len=128,
        audio_dim=48,
        audio_states=5,
        audio_inject_layers=(0, 2, 4),
    ),
    vae=VAEConfig(dim=8),
    speech=SpeechEncoderConfig(
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=96,
        conv_dim=(32,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    ),
    text=TextEncoderConfig(vocab_size=384, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, tokenizer="bytes"),
    stream=StreamConfig(height=96, width=96, speech_window_blocks=4),
)

S2V_14B = Preset(
    name="s2v-14b",
    dit=DiTConfig(
        dim=5120,
        num_heads=40,
        num_layers=40,
        ffn_dim=13_824,
        text_dim=4096,
        text_len=512,
        audio_dim=1024,
        audio_states=25,
        audio_inject_layers=(0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39),
    ),
    vae=VAEConfig(dim=96),
    speech=SpeechEncoderConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        conv_dim=(512,) * 7,
    ),
    text=TextEncoderConfig(vocab_size=256_384, d_model=4096, d_kv=64, d_ff=10_240, num_layers=24, num_heads=64),
    stream=StreamConfig(height=704, width=384),
)

PRESETS: Mapping[str, Preset] = {preset.name: preset for preset in (TINY, S2V_14B)}


def preset(name: str) -> Preset:
    """The preset of that name. Raises `ConfigError` with the names there are."""
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}; choose one of {', '.join(sorted(PRESETS))}.")
    return PRESETS[name]
