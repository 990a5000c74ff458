"""State that the supervisor and the stages share through files in one folder.

The supervisor sets the phase, and counts the stages that it loaded again. The first and the last stage report how many
sessions they hold. Without a folder (a Triton started by hand) the phase is always `SERVING`.
"""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path


class Phase(StrEnum):
    SERVING = "serving"
    DRAINING = "draining"
    """No new sessions; the live ones go on."""
    CLOSING = "closing"
    """The live ones end with their next request."""


class Control:
    """The folder; it must exist."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._told: dict[str, int] = {}

    @property
    def phase(self) -> Phase:
        return Phase(self._read("phase") or Phase.SERVING)

    def set_phase(self, phase: Phase) -> None:
        self._write("phase", phase.value)

    @property
    def live_sessions(self) -> int:
        """Sessions that are live in the first stage or the last: a last block may still be on its way."""
        return max((int(self._read(name) or "0") for name in self._names("sessions.*")), default=0)

    def live_in(self, stage: str) -> int:
        return int(self._read(f"sessions.{stage}") or "0")

    def set_live_sessions(self, stage: str, count: int) -> None:
        if self._told.get(stage) != count:
            self._write(f"sessions.{stage}", str(count))
            self._told[stage] = count

    @property
    def reload_epoch(self) -> int:
        """How often a stage was loaded again; each time all sessions before were lost."""
        return int(self._read("reload_epoch") or "0")

    def advance_reload_epoch(self) -> None:
        self._write("reload_epoch", str(self.reload_epoch + 1))

    def _names(self, pattern: str) -> list[str]:
        return [] if self._folder is None else [path.name for path in self._folder.glob(pattern)]

    def _read(self, name: str) -> str:
        if self._folder is None:
            return ""
        try:
            return (self._folder / name).read_text()
        except FileNotFoundError:
            return ""

    def _write(self, name: str, text: str) -> None:
        """Writes a file atomically."""
        if self._folder is None:
            return
        partial = self._folder / f".{name}.{os.getpid()}"
        partial.write_text(text)
        partial.replace(self._folder / name)
