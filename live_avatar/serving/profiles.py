"""Profiles: short tables that say which stage runs on which device, each stage in a process of its own.

A table (TOML) has a device, `cpu` or `gpu0`, `gpu1` ..., for `conditioning`, `avatar_encoder`, `decoder` and for every
range of denoising steps, `max_sessions`, `known_avatars`, and if it likes `idle_seconds`. Those that are shipped are in
`live_avatar/assets/profiles/`.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from live_avatar.assets import PROFILES
from live_avatar.errors import ConfigError
from live_avatar.graphs.memory import CONDITIONING, DECODER, Stage
from live_avatar.serving.steps import read_steps, stage_name, steps_text

SUFFIX: Final = ".toml"
ALIASES: Final = {"h800x1": "gpux1", "h800x4": "gpux4", "h800x5": "gpux5"}
"""Former names of profiles, and those they have now."""
LEAST_IDLE_S: Final = 1.0
GREATEST_IDLE_S: Final = 86_400.0
DEVICE = re.compile(r"cpu|gpu(0|[1-9][0-9]{0,2})")
DEVICES: Final = ("conditioning", "avatar_encoder", "decoder")
NUMBERS: Final = ("max_sessions", "known_avatars")
KEYS: Final = (*NUMBERS, "idle_seconds", *DEVICES, "steps")
OPTIONAL: Final = ("idle_seconds",)


@dataclass(frozen=True)
class Place:
    """A stage, which is one process, and the number of its GPU; None is the CPU. steps: those that it denoises."""

    name: str
    gpu: int | None
    steps: range | None = None

    @property
    def processor(self) -> str:
        """`gpu0`, `gpu1` ... or `cpu`."""
        return "cpu" if self.gpu is None else f"gpu{self.gpu}"

    @property
    def memory_stage(self) -> Stage:
        """The stage as `graphs.memory` knows it."""
        return self.steps or self.name


@dataclass(frozen=True)
class Profile:
    """Which stage runs where, and the limits of a server with these stages.

    chain: the stages of the pipe in order. encoder_gpu: the GPU of the avatar encoder, beside the pipe, or None.
    """

    name: str
    chain: tuple[Place, ...]
    encoder_gpu: int | None
    max_sessions: int
    known_avatars: int
    idle_seconds: float = 30.0

    @property
    def step_count(self) -> int:
        return sum(len(place.steps or ()) for place in self.chain)

    @property
    def gpus(self) -> list[int]:
        """The numbers of the GPUs that it needs."""
        return sorted({gpu for gpu in (self.encoder_gpu, *(place.gpu for place in self.chain)) if gpu is not None})

    @property
    def on_cpu(self) -> list[Place]:
        """The stages of the pipe that share the memory and the cores of the host."""
        return [place for place in self.chain if place.gpu is None]

    def limited(
        self, max_sessions: int | None = None, known_avatars: int | None = None, idle_seconds: float | None = None
    ) -> Profile:
        """The same with other limits; None keeps the profile's own."""
        return replace(
            self,
            max_sessions=self.max_sessions if max_sessions is None else max_sessions,
            known_avatars=self.known_avatars if known_avatars is None else known_avatars,
            idle_seconds=self.idle_seconds if idle_seconds is None else idle_seconds,
        )


def profile_names() -> list[str]:
    """Names of the shipped profiles."""
    return sorted(path.stem for path in PROFILES.glob(f"*{SUFFIX}"))


def load_profile(chosen: str) -> Profile:
    """A shipped profile by its name, which may be a former one, or that of a file `....toml`.

    Raises `ConfigError` for a profile that does not exist, or a table that is not one.
    """
    if chosen.endswith(SUFFIX):
        return read_profile(Path(chosen))
    name = ALIASES.get(chosen, chosen)
    if name not in profile_names():
        raise ConfigError(
            f"there is no profile {chosen!r}; choose one of {', '.join(profile_names())}, or give a file of your own "
            f"(NAME{SUFFIX})."
        )
    return read_profile(PROFILES / f"{name}{SUFFIX}")


def read_profile(path: Path) -> Profile:
    """The profile in a file, which is named after it. Raises `ConfigError`, with the file's name, for a wrong one."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read the profile {path} ({error.strerror}); give an existing file, or one of "
            f"{', '.join(profile_names())}."
        ) from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise ConfigError(
            f"profile {path} is no TOML ({error}); correct it, for example after {PROFILES / 'cpu.toml'}."
        ) from error
    try:
        return _profile(path.stem, table)
    except ConfigError as error:
        raise ConfigError(f"profile {path}: {error}") from error


def require_gpus(profile: Profile, present: int) -> None:
    """Raises `ConfigError` if the profile needs a GPU that a machine with so many does not have."""
    if any(gpu >= present for gpu in profile.gpus):
        seen = ", ".join(str(gpu) for gpu in range(present)) or "none"
        raise ConfigError(
            f"profile {profile.name} needs GPU {', '.join(map(str, profile.gpus))}, but NVIDIA's driver shows {seen} "
            "on this machine; serve where there are enough of them, or choose another --profile."
        )


def _profile(name: str, table: Mapping[str, Any]) -> Profile:
    _require_keys(table)
    gpus = {key: _gpu(key, table[key]) for key in DEVICES}
    steps = [Place(stage_name(steps), gpu, steps) for steps, gpu in _steps(table["steps"]).items()]
    return Profile(
        name,
        (Place(CONDITIONING, gpus["conditioning"]), *steps, Place(DECODER, gpus["decoder"])),
        gpus["avatar_encoder"],
        _whole("max_sessions", table["max_sessions"], least=1),
        _whole("known_avatars", table["known_avatars"], least=0),
        _seconds("idle_seconds", table.get("idle_seconds", Profile.idle_seconds)),
    )


def _require_keys(table: Mapping[str, Any]) -> None:
    if unknown := sorted(set(table) - set(KEYS)):
        raise ConfigError(f"there is no key {unknown[0]!r}; a profile has {', '.join(KEYS)}.")
    if missing := [key for key in KEYS if key not in table and key not in OPTIONAL]:
        raise ConfigError(f"{missing[0]!r} is missing; a profile has {', '.join(KEYS)}.")


def _gpu(key: str, device: object) -> int | None:
    found = DEVICE.fullmatch(device) if isinstance(device, str) else None
    if found is None:
        raise ConfigError(f'{key} = {device!r} is no device; write "cpu", or "gpu0" for the first GPU.')
    return int(found[1]) if found[1] else None


def _whole(key: str, value: object, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{key} = {value!r}; expected a whole number of at least {least}.")
    return value


def _seconds(key: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not LEAST_IDLE_S <= value <= GREATEST_IDLE_S:
        raise ConfigError(f"{key} = {value!r}; expected {LEAST_IDLE_S:g} to {GREATEST_IDLE_S:g} seconds.")
    return float(value)


def _steps(table: object) -> dict[range, int | None]:
    """Ranges that cover the steps from 1 on without a gap, in order, each with its GPU."""
    if not isinstance(table, dict) or not table:
        raise ConfigError('steps is no table of steps; write [steps] and below it lines such as 1-2 = "gpu0".')
    ranges = [read_steps(key) for key in table]
    _require_cover(ranges)
    return dict(zip(ranges, (_gpu(f"steps {key}", device) for key, device in table.items()), strict=True))


def _require_cover(ranges: Collection[range]) -> None:
    named = [step for steps in ranges for step in steps]
    if twice := sorted({step for step in named if named.count(step) > 1}):
        raise ConfigError(f"step {twice[0]} is named twice; name every step once.")
    if left_out := sorted(set(range(1, max(named) + 1)) - set(named)):
        raise ConfigError(f"step {left_out[0]} is left out; name every step from 1 to {max(named)}.")
    if named != sorted(named):
        ordered = ", ".join(map(steps_text, sorted(ranges, key=lambda steps: steps[0])))
        raise ConfigError(f"the steps are out of order; write {ordered}.")
