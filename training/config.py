"""The configuration of a training run: frozen dataclasses, read from a TOML file.

The keys of the file are the fields here; the error for an unknown key or a wrong type names it. The default learning
rates are the paper's (section 4.2).
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from live_avatar.config import S2V_14B, TEMPORAL_STRIDE, Preset, TAEConfig, preset
from live_avatar.errors import ConfigError
from live_avatar.weights.checkpoint import open_checkpoint
from live_avatar.weights.tensors import Checkpoint


def _expect(config: Any, key: str, holds: bool, expected: str) -> None:
    if not holds:
        raise ConfigError(f"key {key!r} is {getattr(config, key)!r}; expected {expected}.")


def _at_least_one(config: Any, *keys: str) -> None:
    for key in keys:
        _expect(config, key, getattr(config, key) >= 1, "at least 1")


def _above_zero(config: Any, *keys: str) -> None:
    for key in keys:
        _expect(config, key, getattr(config, key) > 0, "a number above 0")


def _shares(config: Any, *keys: str) -> None:
    for key in keys:
        _expect(config, key, 0 <= getattr(config, key) <= 1, "a number from 0 to 1")


@dataclass(frozen=True)
class DataConfig:
    """Number and length of the clips for the transformer's stages."""

    train_clips: int = 1500
    """Of drawn clips; shards give all that they have."""
    validation_clips: int = 16
    """Of shards the first so many at most."""
    blocks: int = 8
    """Blocks of 12 frames (0.48 s) in each clip."""
    shards: str = ""
    """Folder or fsspec URL of shards that `training.prepare` made of videos; empty draws the clips."""

    def __post_init__(self) -> None:
        _at_least_one(self, "train_clips", "validation_clips", "blocks")


@dataclass(frozen=True)
class StageConfig:
    """Settings of every stage. A step takes `batch` clips (or windows), one after another, and updates once."""

    steps: int
    batch: int
    learning_rate: float
    warmup_steps: int = 50
    """Steps in which the learning rate rises from 0; then it falls as a cosine to `final_rate` of its peak."""
    final_rate: float = 0.1
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema: float = 0.0
    """Decay of the moving average of the weights, for the next stage and the export; 0 takes the weights."""
    checkpoint_every: int = 200
    log_every: int = 10

    def __post_init__(self) -> None:
        _at_least_one(self, "steps", "batch", "checkpoint_every", "log_every")
        _above_zero(self, "learning_rate", "clip_norm")
        _shares(self, "final_rate")
        _expect(self, "warmup_steps", self.warmup_steps >= 0, "0 or more")
        _expect(self, "weight_decay", self.weight_decay >= 0, "0 or more")
        _expect(self, "ema", 0 <= self.ema < 1, "a number from 0 to below 1")


@dataclass(frozen=True)
class ReconstructionStage(StageConfig):
    """Settings of the stages that learn to give frames back."""

    frames: int = 13
    """1 + a multiple of 4 video frames."""
    mouth_weight: float = 4.0
    """Weight of the pixels around the mouth in the reconstruction loss, against 1 elsewhere."""
    still_steps: int = 0
    """Number of steps at the start that train on single pictures instead of clips."""
    still_batch: int = 8
    """Number of pictures in such a step, each of another face."""
    mouth_batch: int = 0
    """Whole clips, cut to the region of the mouth, in a step in addition to its `batch` pieces of clips."""
    square_weight: float = 0.0
    """Weight of the mean square error, added to the mean absolute error. It stresses the few pixels with large errors,
    where the mouth is not yet followed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = self.frames > TEMPORAL_STRIDE and self.frames % TEMPORAL_STRIDE == 1
        _expect(self, "frames", whole, f"1 + a multiple of {TEMPORAL_STRIDE}")
        _above_zero(self, "mouth_weight")
        _expect(self, "still_steps", self.still_steps >= 0, "0 or more")
        _at_least_one(self, "still_batch")
        _expect(self, "mouth_batch", self.mouth_batch >= 0, "0 or more")
        _expect(self, "square_weight", self.square_weight >= 0, "0 or more")


@dataclass(frozen=True)
class VAEReconstructionStage(ReconstructionStage):
    """Settings of both VAE stages."""

    smooth_weight: float = 1e-4
    """Weight of the mean square of the latents, which keeps them small."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _expect(self, "smooth_weight", self.smooth_weight >= 0, "0 or more")


@dataclass(frozen=True)
class VAEStage(VAEReconstructionStage):
    """Stage 0a: the video VAE, on reconstruction of rendered clips."""


@dataclass(frozen=True)
class MouthStage(VAEReconstructionStage):
    """Stage 0b: further training of the video VAE, mostly on mouths."""

    mouth_batch: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_one(self, "mouth_batch")


@dataclass(frozen=True)
class DecoderStage(ReconstructionStage):
    """The tiny decoder, which learns to give the frames of the frozen VAE's decoder. No other stage needs it."""

    channels: tuple[int, ...] = (64, 32, 16, 8)
    """Widths from the latents to the frames, as in `live_avatar.config.TAEConfig`."""
    noise: float = 0.3
    """Largest deviation of the noise on the latents, for the transformer's latents are not those of an encoder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _expect(self, "noise", self.noise >= 0, "0 or more")
        TAEConfig(self.channels)  # raises ConfigError

    @property
    def network(self) -> TAEConfig:
        """The sizes of the network. Raises `ConfigError`."""
        return TAEConfig(self.channels)


@dataclass(frozen=True)
class EncoderStage(StageConfig):
    """Stage 0c: the speech and text encoders. There are no public ones of these sizes, so they are trained on the drawn
    face: mouth shapes from speech, looks from a prompt."""


@dataclass(frozen=True)
class DiTStage(StageConfig):
    """Settings of the transformer's stages."""

    blocks: int = 7
    """Consecutive blocks of a clip in a step."""
    motion_weight: float = 0.5
    """Share of the loss on regions that move, by one map for all clips; 0 weighs all latent pixels equally."""
    far_share: float = 0.3
    """Share of clips at a random time of a stream of hours, so that no position is new at inference."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_one(self, "blocks")
        _shares(self, "motion_weight", "far_share")


@dataclass(frozen=True)
class TeacherStage(DiTStage):
    """Stage 0d: the bidirectional teacher."""

    audio_dropout: float = 0.1
    """Share of clips without their speech, for guidance by speech."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _shares(self, "audio_dropout")


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters on the linears of `linears.LORA_TARGET`. The released student has rank 128, alpha 64."""

    rank: int
    alpha: float

    def __post_init__(self) -> None:
        _at_least_one(self, "rank")
        _above_zero(self, "alpha")


@dataclass(frozen=True)
class DistillationStage(DiTStage):
    """Stage 2: self-forcing distribution matching distillation."""

    learning_rate: float = 1e-5
    fake_learning_rate: float = 2e-6
    fake_steps: int = 5
    """Updates of the fake score for each update of the generator."""
    guidance: float = 1.0
    """Scale of the real score's guidance by speech; 1 is no guidance."""
    history_noise: float = 0.0
    """Largest noise level mixed into the cached history's latents (section 4.2); 0 leaves the same-noise cache."""
    clean_history: bool = False
    """Whether the cached history is of clean latents, by one more pass per block (Table 6); else history corrupt."""
    replaces_sink: bool = True
    """Whether the generator's own first frame replaces the sink (AAS) in some windows; False for an ablation."""
    rolls: bool = True
    """Whether the sink's position moves with the blocks (rolling RoPE); False for an ablation."""
    accumulate: bool = True
    """Whether to accumulate gradients by block (Algorithm 2); False is the plain loop with the same gradient."""
    lora: LoRAConfig | None = None
    """Adapters of the generator that are trained; None trains all its weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_one(self, "fake_steps")
        _above_zero(self, "fake_learning_rate")
        _shares(self, "history_noise")
        _expect(self, "guidance", self.guidance >= 0, "0 or more")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every run has: the paper's two stages and their data."""

    stage1: DiTStage
    stage2: DistillationStage
    data: DataConfig = field(default_factory=DataConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        _expect(self, "seed", self.seed >= 0, "0 or more")

    @property
    def system(self) -> Preset:
        """The preset that is trained."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(RunConfig):
    """The configuration of a run from nothing: all networks of a preset, on drawn faces."""

    vae: VAEStage
    mouths: MouthStage
    encoders: EncoderStage
    teacher: TeacherStage
    decoder: DecoderStage
    preset: str = "tiny"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.system.text.tokenizer != "bytes":
            raise ConfigError(
                f"key 'preset' is {self.preset!r}, whose encoders are the official ones; only presets with encoders of "
                "the project's own, such as tiny, are trained from nothing."
            )
        for name in ("teacher", "stage1", "stage2"):
            blocks = getattr(self, name).blocks
            if blocks > self.data.blocks:
                raise ConfigError(
                    f"key '{name}.blocks' is {blocks}; expected at most data.blocks, {self.data.blocks}: a step sees "
                    "part of a clip."
                )

    @property
    def system(self) -> Preset:
        return preset(self.preset)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(RunConfig):
    """The configuration of adapters on a checkpoint of any size: the teacher, and the frozen base of all networks.

    Each process has its own clips, so `batch` of a stage is a multiple of their number.
    """

    checkpoint: str
    """Folder of the checkpoint: the official download, or files of the project's own."""
    lora: LoRAConfig
    """Adapters of the generator and of the fake score."""
    preset: str | None = None
    """Preset of the checkpoint; None takes the sizes from the files of an official download."""
    height: int = S2V_14B.stream.height
    width: int = S2V_14B.stream.width
    precision: str = "bfloat16"
    """Type of the base's large linears and of the caches. Adapters, gradients and moments are float32."""
    recompute: bool = True
    """Whether the backward pass computes each layer again (activation checkpointing); False keeps all activations."""
    shard_ranks: int = 0
    """Processes that share one copy of the base, such as those of a node; 0 for all. More processes are further groups,
    each with a copy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _expect(self, "shard_ranks", self.shard_ranks >= 0, "0 or more")
        _expect(self, "precision", self.precision in ("float32", "bfloat16"), "float32 or bfloat16")
        if not self.data.shards:
            raise ConfigError(
                "key 'data.shards' is missing; give the folder or URL that python -m training.prepare has written."
            )
        if self.stage2.lora is not None:
            raise ConfigError("key 'stage2.lora' is of runs from nothing; here [lora] is for both stages.")

    @property
    def system(self) -> Preset:
        found = preset(self.preset) if self.preset is not None else open_checkpoint(None, Path(self.checkpoint)).preset
        return found.with_stream(height=self.height, width=self.width).with_precision(self.precision)

    def weights(self) -> Checkpoint:
        """The checkpoint, with names and shapes checked. Raises `CheckpointError`."""
        return open_checkpoint(self.system, Path(self.checkpoint))


def load(path: Path) -> TrainingConfig | AdapterConfig:
    """Reads a TOML file; one with the key `checkpoint` trains adapters. Raises `ConfigError` with the first fault."""
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give a TOML file.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML ({error}); mend it there.") from error
    kind = AdapterConfig if "checkpoint" in values else TrainingConfig
    config: TrainingConfig | AdapterConfig = _made(kind, values, str(path), "")
    return config


def _made(kind: Any, values: Mapping[str, Any], origin: str, prefix: str) -> Any:
    hints = get_type_hints(kind)
    fields = {one.name: one for one in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            known = ", ".join(sorted(fields))
            raise ConfigError(f"{origin}: there is no key {prefix + name!r}; the keys there are {known}.")
    for name, one in fields.items():
        required = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{origin}: key {prefix + name!r} is missing; it has no default.")
    made = {name: _value(hints[name], value, origin, prefix + name) for name, value in values.items()}
    try:
        return kind(**made)
    except ConfigError as error:
        place = f" in [{prefix.removesuffix('.')}]," if prefix else ""
        raise ConfigError(f"{origin}:{place} {error}") from error


def _value(hint: Any, value: Any, origin: str, key: str) -> Any:
    if get_origin(hint) in (types.UnionType,):
        (hint,) = (one for one in get_args(hint) if one is not type(None))
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{origin}: key {key!r} is {value!r}; expected a table, [{key}].")
        return _made(hint, value, origin, key + ".")
    if hint is float and type(value) is int:
        return float(value)
    if get_origin(hint) is tuple:
        if not isinstance(value, list) or any(type(one) is not int or one < 1 for one in value):
            raise ConfigError(f"{origin}: key {key!r} is {value!r}; expected whole numbers above 0, such as [2, 1].")
        return tuple(value)
    if type(value) is not hint:
        raise ConfigError(f"{origin}: key {key!r} is {value!r}; expected {hint.__name__}.")
    return value
