"""Settings that `live-avatar serve` passes to the processes of the stages through the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

ARTIFACTS_VARIABLE = "LIVE_AVATAR_ARTIFACTS"
"""The artifacts folder that the stages load."""
CONTROL_VARIABLE = "LIVE_AVATAR_CONTROL"
"""The folder that supervisor and stages share (`control`); unset without a supervisor."""
LABEL_FONT_VARIABLE = "LIVE_AVATAR_LABEL_FONT"
"""A font file for visible labels; unset for the built-in font."""
MANIFEST_VARIABLE = "LIVE_AVATAR_MANIFEST"
"""SHA-256 of the manifest that the server was started with; unset to take any."""
LABEL_VARIABLE = "LIVE_AVATAR_LABEL"
"""A label that the operator puts on the frames of every session; unset for none."""
WATERMARK_VARIABLE = "LIVE_AVATAR_WATERMARK"
"""The file with the key of the invisible mark; unset for none."""
TRACE_VARIABLE = "LIVE_AVATAR_TRACE"
"""A folder where each stage writes its busy intervals; unset for none."""
FLOOR_VARIABLE = "LIVE_AVATAR_STAGE_FLOOR_S"
"""The least time that a stage takes for a block, in seconds; unset for none. For measurements: with equal stages that
do not share cores, the rest of the time is the overhead of serving."""
TURNS_VARIABLE = "LIVE_AVATAR_TURNS"
"""A lock file and the stages that take turns with it (`turns`); unset for none. For measurements."""


@dataclass(frozen=True)
class StageSettings:
    """The settings of all stages of a server. turns: a `turns.turns_value`."""

    artifacts: Path
    manifest: str | None = None
    control: Path | None = None
    label_font: Path | None = None
    label: str | None = None
    watermark: Path | None = None
    trace: Path | None = None
    stage_floor_s: float = 0.0
    turns: str | None = None

    def to_environment(self) -> dict[str, str]:
        """The variables; a setting of None has none."""
        values = {
            ARTIFACTS_VARIABLE: self.artifacts,
            MANIFEST_VARIABLE: self.manifest,
            CONTROL_VARIABLE: self.control,
            LABEL_FONT_VARIABLE: self.label_font,
            LABEL_VARIABLE: self.label,
            WATERMARK_VARIABLE: self.watermark,
            TRACE_VARIABLE: self.trace,
            FLOOR_VARIABLE: self.stage_floor_s,
            TURNS_VARIABLE: self.turns,
        }
        return {name: str(value) for name, value in values.items() if value is not None}

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Raises `KeyError` without the artifacts."""

        def path(name: str) -> Path | None:
            return Path(environment[name]) if environment.get(name) else None

        return cls(
            Path(environment[ARTIFACTS_VARIABLE]),
            environment.get(MANIFEST_VARIABLE),
            path(CONTROL_VARIABLE),
            path(LABEL_FONT_VARIABLE),
            environment.get(LABEL_VARIABLE),
            path(WATERMARK_VARIABLE),
            path(TRACE_VARIABLE),
            float(environment.get(FLOOR_VARIABLE, "0")),
            environment.get(TURNS_VARIABLE),
        )
