"""Reads speech from media files and writes frames and speech to MP4 files, with PyAV (extra `media`)."""

import contextlib
import itertools
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import numpy as np

try:
    import av
except ImportError as error:
    raise ImportError(
        "live_avatar_client.media needs PyAV; install it with: pip install 'live-avatar-client[media]'"
    ) from error

from .cutter import Samples, as_samples
from .errors import InvalidInput, MediaError
from .files import FileWriter, OutputFile, require_file
from .image import read_image_bytes
from .messages import Pixels
from .protocol import FPS, SAMPLE_RATE_HZ

__all__ = ["Mp4Writer", "provenance_metadata", "read_image_bytes", "read_speech"]

_VIDEO_OPTIONS: Final = {"crf": "18", "preset": "veryfast"}
_AUDIO_BIT_RATE: Final = 96_000
# Without the second flag MP4 keeps only the entries that FFmpeg has a place for.
_CONTAINER_OPTIONS: Final = {"movflags": "+faststart+use_metadata_tags"}
_FAULTS: Final = (av.FFmpegError, OSError)


def read_speech(path: str | os.PathLike[str]) -> Samples:
    """Read the first audio stream of any media file as int16 samples, mono, 16 kHz."""
    require_file(path, "speech", "an audio or video file")
    name = repr(os.fspath(path))
    try:
        with av.open(os.fspath(path)) as container:
            if not container.streams.audio:
                raise MediaError(f"the speech {name} has no audio stream; pass a file with sound")
            chunks = list(_resampled(container, name))
    except _FAULTS as error:
        raise MediaError(
            f"the speech {name} cannot be read as audio: {error.strerror}; pass a file that FFmpeg can read, "
            "such as WAV, FLAC, MP3, Ogg or M4A"
        ) from error
    speech: Samples = np.concatenate([np.zeros(0, np.int16), *chunks])
    if not len(speech):
        raise MediaError(f"the speech {name} has 0 samples; pass a file with sound")
    return speech


def _resampled(container: av.container.InputContainer, name: str) -> Iterator[Samples]:
    # The format can change inside a concatenated file, and a resampler accepts only one format.
    for _, frames in itertools.groupby(container.decode(audio=0), _form):
        resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE_HZ)
        for frame in frames:
            samples = frame.to_ndarray()
            if samples.dtype.kind == "f" and not np.isfinite(samples).all():
                raise MediaError(f"the speech {name} has NaN or infinite samples at {frame.time:.3f} s; mend it")
            for converted in resampler.resample(frame):
                yield converted.to_ndarray()[0]
        for converted in resampler.resample(None):
            yield converted.to_ndarray()[0]


def _form(frame: av.AudioFrame) -> tuple[str, str, int]:
    return frame.format.name, frame.layout.name, frame.sample_rate


def provenance_metadata(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Return a video file's metadata from `AvatarSession.provenance`.

    `comment` is a sentence, `description` is the unchanged provenance, and `AIGC` is the implicit label of
    GB 45438-2025: AI-generated (1), the generator, and a number of this video.
    """
    generator = " ".join(str(provenance[key]) for key in ("generator", "version") if key in provenance)
    label = {
        "Label": "1",
        "ContentProducer": generator,
        "ProduceID": uuid.uuid4().hex,
    }
    return {
        "comment": f"AI-generated video: the person in it is animated by {generator or 'a Live Avatar server'}.",
        "description": json.dumps(provenance, sort_keys=True),
        "AIGC": json.dumps(label),
    }


class Mp4Writer(FileWriter):
    """Writes an MP4 file of H.264 video and AAC speech, piece by piece, in a `with` statement.

    The file appears under its name at the normal end of the statement; after an exception there is no file.
    Speech after the last frame is dropped. H.264 needs even sizes, so the last column or row of a frame of
    odd width or height is doubled.

    Args:
        path: path of the file; an existing file is replaced.
        width, height: the size of the frames.
        fps: frames per second.
        speech: the speech from the first frame on, in the forms that `AvatarSession.send` takes.
        metadata: entries such as title and comment, or those of `provenance_metadata`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        width: int,
        height: int,
        fps: int = FPS,
        *,
        speech: object | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        super().__init__(OutputFile(path, "video"))
        self.frames = 0
        """How many frames were written."""
        self._shape = (height, width, 3)
        self._fps = fps
        self._speech = None if speech is None else as_samples(speech)
        self._samples_written = 0
        self._metadata = dict(metadata or {})
        if min(width, height, fps) < 1:
            raise InvalidInput(f"the video has {width} x {height} pixels at {fps} fps; pass numbers above 0")

    def write(self, frames: Pixels) -> None:
        """Append one frame [height, width, 3] or several [n, height, width, 3], as RGB uint8."""
        for frame in frames if frames.ndim == 4 else frames[np.newaxis]:
            if frame.shape != self._shape or frame.dtype != np.uint8:
                raise InvalidInput(f"the frame is {frame.dtype} {list(frame.shape)}; pass uint8 {list(self._shape)}")
            with self._file.explained(_FAULTS):
                self._write_frame(frame)
                self._write_speech()

    def _open(self) -> None:
        with self._file.explained(_FAULTS):
            self._container = av.open(str(self._file.partial), "w", format="mp4", options=_CONTAINER_OPTIONS)
        self._container.metadata.update(self._metadata)
        height, width, _ = self._shape
        self._video = self._container.add_stream("libx264", rate=self._fps, options=_VIDEO_OPTIONS)
        self._video.width, self._video.height = width + width % 2, height + height % 2
        self._video.pix_fmt = "yuv420p"
        if self._speech is not None:
            self._audio = self._container.add_stream("aac", rate=SAMPLE_RATE_HZ, layout="mono")
            self._audio.bit_rate = _AUDIO_BIT_RATE

    def _write_frame(self, frame: Pixels) -> None:
        height, width, _ = self._shape
        even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
        picture.pts, picture.time_base = self.frames, Fraction(1, self._fps)
        self._container.mux(self._video.encode(picture))
        self.frames += 1

    def _write_speech(self) -> None:
        """Append the speech up to the end of the last frame."""
        if self._speech is None:
            return
        start, stop = self._samples_written, self.frames * SAMPLE_RATE_HZ // self._fps
        chunk = self._speech[start:stop]
        if not len(chunk):
            return
        sound = av.AudioFrame.from_ndarray(chunk[np.newaxis], format="s16", layout="mono")
        sound.sample_rate = SAMPLE_RATE_HZ
        sound.pts, sound.time_base = start, Fraction(1, SAMPLE_RATE_HZ)
        self._container.mux(self._audio.encode(sound))
        self._samples_written += len(chunk)

    def _abandon(self) -> None:
        with contextlib.suppress(*_FAULTS):  # the abandoned file may be incomplete
            self._container.close()

    def _finish(self) -> None:
        if not self.frames:
            raise MediaError(f"the video {str(self.path)!r} got 0 frames; write at least one")
        with self._file.explained(_FAULTS):
            self._container.mux(self._video.encode(None))
            if self._speech is not None:
                self._container.mux(self._audio.encode(None))
            self._container.close()
        self._file.publish()
