"""State that the supervisor and the stages share through files in one folder: how often a stage was loaded again.

Without a folder (a Triton started by hand) nothing is shared.
"""

from __future__ import annotations

import os
from pathlib import Path

RELOAD_EPOCH = "reload_epoch"


class Control:
    """The folder; it must exist."""

    def __init__(self, folder: Path | None) -> None:
        self._file = None if folder is None else folder / RELOAD_EPOCH

    @property
    def reload_epoch(self) -> int:
        """How often a stage was loaded again; each time all sessions before were lost."""
        if self._file is None:
            return 0
        try:
            return int(self._file.read_text())
        except FileNotFoundError:
            return 0

    def advance_reload_epoch(self) -> None:
        """Counts one more, atomically."""
        if self._file is not None:
            partial = self._file.with_name(f".{RELOAD_EPOCH}.{os.getpid()}")
            partial.write_text(str(self.reload_epoch + 1))
            partial.replace(self._file)
