"""The files that a video of known speech goes into: MP4, and on demand the raw frames.

Knows files and frames; it knows no server. Both files appear when the `with` statement is left normally,
and neither does after an exception.
"""

import contextlib
import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from .core import Pixels, Samples
from .errors import InvalidInput, MediaError
from .media import Mp4Writer
from .protocol import SAMPLES_PER_FRAME


class NpyWriter:
    """Writes a known number of frames to a `.npy` file, uint8 [frames, height, width, 3], as they come."""

    def __init__(self, path: str | os.PathLike[str], shape: tuple[int, int, int, int]) -> None:
        self.path = Path(path)
        self._shape = shape
        self._written = 0

    def __enter__(self) -> Self:
        self._partial = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.part")
        try:
            self._frames: npt.NDArray[np.uint8] = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
                self._partial, mode="w+", dtype=np.uint8, shape=self._shape
            )
        except OSError as error:
            raise MediaError(
                f"the frames {str(self.path)!r} cannot be written: {error.strerror}; pass a path in a folder "
                "that exists, is writable and has room"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        complete = self._written == self._shape[0]
        try:
            if error is None and complete:
                self._partial.replace(self.path)
        finally:
            self._partial.unlink(missing_ok=True)
        if error is None and not complete:
            raise MediaError(f"the frames {str(self.path)!r} got {self._written} frames; {self._shape[0]} were due")

    def write(self, frames: Pixels) -> None:
        """Append frames [n, height, width, 3]."""
        stop = self._written + len(frames)
        if stop > self._shape[0] or frames.shape[1:] != self._shape[1:]:
            raise InvalidInput(
                f"frames {list(frames.shape)} after {self._written} do not fit into {list(self._shape)}; "
                "pass the frames of this speech only"
            )
        self._frames[self._written : stop] = frames
        self._written = stop


class SpeechVideo:
    """The video of a speech, int16 [samples] at 16 kHz: MP4 at `path`, raw frames at `frames_path` if given.

    The frames' size is learnt from the first that is written.
    """

    def __init__(
        self, path: str | os.PathLike[str], speech: Samples, frames_path: str | os.PathLike[str] | None = None
    ) -> None:
        self._path = path
        self._speech = speech
        self._frames_path = frames_path
        self._writers: list[Mp4Writer | NpyWriter] = []
        self.expected_frames = -(-len(speech) // SAMPLES_PER_FRAME)

    def __enter__(self) -> Self:
        self._open = contextlib.ExitStack().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def write(self, frames: Pixels) -> None:
        """Append frames [n, height, width, 3]."""
        if not self._writers:
            self._start(*frames.shape[1:3])
        for writer in self._writers:
            writer.write(frames)

    def _start(self, height: int, width: int) -> None:
        self._writers.append(self._open.enter_context(Mp4Writer(self._path, width, height, speech=self._speech)))
        if self._frames_path is not None:
            shape = (self.expected_frames, height, width, 3)
            self._writers.append(self._open.enter_context(NpyWriter(self._frames_path, shape)))
