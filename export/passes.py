"""The passes of the transformer that a calibration has made, in a folder, so that it can go on after an interruption.

Nothing else of a calibration takes long. So one that goes on starts from the first block, and takes the outputs of the
passes that are there. Keys and values of blocks that have left the rings are removed, since no pass reads them again.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from live_avatar.arrays import Array, Arrays
from live_avatar.config import StreamConfig
from live_avatar.errors import ExportError
from live_avatar.json_files import read_json
from live_avatar.runtime.torch_runtime import to_numpy, to_torch

PATCHES = "patches"
"""The output that is kept of every pass; the others are keys and values."""
MADE_FROM = "made_from.json"
RESULT, SINK, BLOCK = "result", "sink", "block"
"""Kinds of files of a pass. The result is written last: a pass is there if it is."""


class Passes:
    """The passes of one calibration, counted from 0; `facts` say by name what it is made from.

    Raises `ExportError` if the folder has passes of other facts, or cannot be read or written.
    """

    def __init__(self, folder: Path, facts: Mapping[str, str], stream: StreamConfig) -> None:
        self._folder = folder
        self._kept = stream.steps * stream.past_blocks + 1  # a prefill may stand between the passes of blocks
        if folder.exists():
            self._compare(facts)
        else:
            folder.mkdir(parents=True)
            self._write(MADE_FROM, lambda path: path.write_text(json.dumps(dict(facts), indent=1) + "\n"))
        self.done = next(number for number in count() if not self._path(number, RESULT).exists())

    def load(self, number: int) -> tuple[dict[str, Array], dict[str, float]]:
        """Outputs, and the largest input of each linear in this pass and those before it.

        Keys and values that were removed are one zero, which fits into a ring of any size.
        """
        result = self._read(self._path(number, RESULT))
        tensors = {PATCHES: result[PATCHES]}
        for kind in (SINK, BLOCK):
            if (path := self._path(number, kind)).exists():
                tensors |= self._read(path)
        removed = np.zeros((1, 1, 1, 1), dtype=np.float32)
        outputs = {name: to_numpy(tensors[name]) if name in tensors else removed for name in result["names"]}
        return outputs, result["amax"]

    def store(self, number: int, outputs: Arrays, amax: Mapping[str, float], kind: str) -> None:
        """Writes a pass of `kind` SINK (its keys and values are read until the end) or BLOCK."""
        tensors = {name: to_torch(array) for name, array in outputs.items()}
        result = {PATCHES: tensors.pop(PATCHES), "names": list(outputs), "amax": dict(amax)}
        self._write(self._path(number, kind).name, lambda path: torch.save(tensors, path))
        self._write(self._path(number, RESULT).name, lambda path: torch.save(result, path))
        self._path(number - self._kept, BLOCK).unlink(missing_ok=True)

    def remove(self) -> None:
        """Removes the folder: the calibration is complete."""
        for path in self._folder.iterdir():
            path.unlink()
        self._folder.rmdir()

    def _compare(self, facts: Mapping[str, str]) -> None:
        path = self._folder / MADE_FROM
        try:
            found = read_json(path)
        except (OSError, ValueError) as error:
            raise ExportError(f"{path} cannot be read ({error}); remove {self._folder} to begin again.") from error
        for name, value in facts.items():
            if not isinstance(found, dict) or found.get(name) != value:
                raise ExportError(
                    f"{self._folder} holds a calibration that was begun with another {name}; give the same to go "
                    "on, or remove the folder to begin again."
                )

    def _path(self, number: int, kind: str) -> Path:
        return self._folder / f"{number:04}.{kind}.pt"

    def _read(self, path: Path) -> Any:
        try:
            return torch.load(path, mmap=True, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ExportError(f"{path} cannot be read; remove {self._folder} to begin again.") from error

    def _write(self, name: str, written: Callable[[Path], object]) -> None:
        """Under another name until it is whole."""
        unfinished = self._folder / "unfinished"
        try:
            written(unfinished)
        except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as a RuntimeError
            raise ExportError(
                f"{self._folder / name} cannot be written ({error}); make room, and give the same command to go on."
            ) from error
        unfinished.rename(self._folder / name)
