"""Writes the video of a known speech to an MP4 file and, if asked, its raw frames to a `.npy` file.

Both files appear at the normal end of the `with` statement, and neither after an exception.
"""

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeAlias

import numpy as np

from .cutter import Samples
from .errors import InvalidInput, MediaError
from .files import FileWriter, OutputFile
from .media import Mp4Writer
from .messages import Pixels
from .protocol import SAMPLES_PER_FRAME

if TYPE_CHECKING:
    from .credentials import ContentCredentials

Metadata: TypeAlias = Mapping[str, str]


class NpyWriter(FileWriter):
    """Writes a known number of frames to a `.npy` file, uint8 [frames, height, width, 3], as they come."""

    def __init__(self, path: str | os.PathLike[str], shape: tuple[int, int, int, int]) -> None:
        self.path = Path(path)
        super().__init__(OutputFile(path, "frames"))
        self._shape = shape
        self._written = 0

    def write(self, frames: Pixels) -> None:
        """Append frames [n, height, width, 3]."""
        stop = self._written + len(frames)
        if stop > self._shape[0] or frames.shape[1:] != self._shape[1:]:
            raise InvalidInput(
                f"frames {list(frames.shape)} after {self._written} do not fit into {list(self._shape)}; "
                "pass the frames of this speech only"
            )
        with self._file.explained():
            self._stream.write(frames.tobytes())
        self._written = stop

    def _open(self) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": self._shape}
        with self._file.explained():
            self._stream = self._file.partial.open("wb")
            np.lib.format.write_array_header_1_0(self._stream, header)  # type: ignore[no-untyped-call]

    def _abandon(self) -> None:
        with contextlib.suppress(OSError):  # the abandoned file may be incomplete
            self._stream.close()

    def _finish(self) -> None:
        if self._written != self._shape[0]:
            raise MediaError(f"the frames {str(self.path)!r} got {self._written} frames; {self._shape[0]} were due")
        with self._file.explained():
            self._stream.close()
        self._file.publish()


class SpeechVideo:
    """The video of a speech, int16 [samples] at 16 kHz: MP4 at `path`, raw frames at `frames_path` if given.

    Entering it checks that both files can be written. The first frame sets the frame size. `metadata` goes into
    the MP4; if it is a function, it is called with the first frame, when the server's first answer is known.
    `credentials` sign the MP4.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        speech: Samples,
        frames_path: str | os.PathLike[str] | None = None,
        *,
        metadata: Metadata | Callable[[], Metadata] | None = None,
        credentials: "ContentCredentials | None" = None,
    ) -> None:
        self._path = path
        self._speech = speech
        self._frames_path = frames_path
        self._metadata = metadata
        self._credentials = credentials
        self._writers: list[Mp4Writer | NpyWriter] = []
        self._written = 0
        self.expected_frames = -(-len(speech) // SAMPLES_PER_FRAME)

    def __enter__(self) -> Self:
        video = OutputFile(self._path, "video")
        video.check()
        if self._frames_path is not None:
            frames = OutputFile(self._frames_path, "frames")
            frames.check()
            if frames.target == video.target:
                raise InvalidInput(f"video and frames both go to {os.fspath(self._path)!r}; pass two paths")
        self._open = contextlib.ExitStack().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self._written != self.expected_frames:
            with self._open:
                raise MediaError(
                    f"the video {os.fspath(self._path)!r} got {self._written} frames; {self.expected_frames} were due"
                )
        self._open.__exit__(kind, error, trace)

    def write(self, frames: Pixels) -> None:
        """Append frames [n, height, width, 3]."""
        if not self._writers:
            self._start(*frames.shape[1:3])
        for writer in self._writers:
            writer.write(frames)
        self._written += len(frames)

    def _start(self, height: int, width: int) -> None:
        if self._frames_path is not None:
            shape = (self.expected_frames, height, width, 3)
            self._writers.append(self._open.enter_context(NpyWriter(self._frames_path, shape)))
        # The MP4 is finished first: if that fails, there is no frames file either.
        metadata = self._metadata() if callable(self._metadata) else self._metadata
        video = Mp4Writer(
            self._path, width, height, speech=self._speech, metadata=metadata, credentials=self._credentials
        )
        self._writers.append(self._open.enter_context(video))
