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

from live_avatar.config import TEMPORAL_STRIDE, Preset, preset
from live_avatar.errors import ConfigError


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
    """Settings of both VAE stages."""

    frames: int = 13
    """1 + a multiple of 4 video frames."""
    mouth_weight: float = 4.0
    """Weight of the pixels around the mouth in the reconstruction loss, against 1 elsewhere."""
    smooth_weight: float = 1e-4
    """Weight of the mean square of the latents, which keeps them small."""

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = self.frames > TEMPORAL_STRIDE and self.frames % TEMPORAL_STRIDE == 1
        _expect(self, "frames", whole, f"1 + a multiple of {TEMPORAL_STRIDE}")
        _above_zero(self, "mouth_weight")
        _expect(self, "smooth_weight", self.smooth_weight >= 0, "0 or more")


@dataclass(frozen=True)
class VAEStage(ReconstructionStage):
    """Stage 0a: the video VAE, on reconstruction of rendered clips."""

    still_steps: int = 0
    """Number of steps at the start that train on single pictures instead of clips."""
    still_batch: int = 8
    """Number of pictures in such a step, each of another face."""


@dataclass(frozen=True)
class MouthStage(ReconstructionStage):
    """Stage 0b: further training of the video VAE, mostly on mouths."""

    mouth_batch: int = 2
    """Whole clips, cut to the region of the mouth, in a step in addition to its `batch` pieces of clips."""
    square_weight: float = 0.0
    """Weight of the mean square error, added to the mean absolute error. It stresses the few pixels with large errors,
    where the mouth is not yet followed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_one(self, "mouth_batch")
        _expect(self, "square_weight", self.square_weight >= 0, "0 or more")


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


@dataclass(frozen=True)
class TrainingConfig:
    """The configuration of a whole run."""

    vae: VAEStage
    mouths: MouthStage
    encoders: EncoderStage
    teacher: TeacherStage
    stage1: DiTStage
    stage2: DistillationStage
    data: DataConfig = field(default_factory=DataConfig)
    preset: str = "tiny"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.system.text.tokenizer != "bytes":
            raise ConfigError(
                f"key 'preset' is {self.preset!r}, whose encoders are the official ones; only presets with encoders of "
                "the project's own, such as tiny, are trained from nothing."
            )
        _expect(self, "seed", self.seed >= 0, "0 or more")
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


def load(path: Path) -> TrainingConfig:
    """Reads a TOML file. Raises `ConfigError` with the key of the first fault."""
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give a TOML file.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML ({error}); mend it there.") from error
    config: TrainingConfig = _made(TrainingConfig, values, str(path), "")
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
    if type(value) is not hint:
        raise ConfigError(f"{origin}: key {key!r} is {value!r}; expected {hint.__name__}.")
    return value
