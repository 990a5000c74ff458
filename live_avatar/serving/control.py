"""State that the supervisor, the gateway and the stages share through files in one folder: how often a stage was loaded
again, whether each stage still works, and which sessions nobody waits for.

Without a folder (a Triton started by hand) no stage ever was loaded again, and nobody asks whether one works.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


class Control:
    """The folder; it must exist."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    @property
    def reload_epoch(self) -> int:
        """How often a stage was loaded again; each time all sessions before were lost."""
        return int(self._read("reload_epoch") or "0")

    def advance_reload_epoch(self) -> None:
        self._write("reload_epoch", str(self.reload_epoch + 1))

    def beat(self, stage: str, sign: float) -> None:
        """Writes a stage's sign of life: a time that changes while it works. Does nothing if the folder is gone."""
        with suppress(OSError):
            self._write(f"beat_{stage}", repr(sign))

    def last_beat(self, stage: str) -> str:
        """The last sign of a stage as it was written; empty without one."""
        return self._read(f"beat_{stage}")

    def forget_beat(self, stage: str) -> None:
        """Removes the sign of a stage whose process is gone."""
        if self._folder is not None:
            self._folder.joinpath(f"beat_{stage}").unlink(missing_ok=True)

    def abandon(self, session: int) -> None:
        """Says that nobody waits for the blocks of a session that are under way. Does nothing if the folder is gone."""
        with suppress(OSError):
            self._write(f"abandoned_{session}", "")

    def is_abandoned(self, session: int) -> bool:
        return self._folder is not None and self._folder.joinpath(f"abandoned_{session}").exists()

    def forget_abandoned(self, session: int) -> None:
        """The session has ended in all stages."""
        if self._folder is not None:
            self._folder.joinpath(f"abandoned_{session}").unlink(missing_ok=True)

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
