"""Reads the frames of a video or picture file for the search for a mark."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import av

from live_avatar.arrays import Array
from live_avatar.errors import WatermarkError
from live_avatar.watermark.detect import Evidence, reduced

MOST_FRAMES: Final = 1_500
"""Frames that are read: a minute at 25 frames per second. All that lies behind them carries the same mark."""
MOST_PIXELS: Final = 2_000_000
"""Larger frames are reduced, since the mark's waves are coarse."""
_OPTIONS: Final = {"protocol_whitelist": "none"}  # keeps a playlist from opening other files


@dataclass(frozen=True)
class Seen:
    """What was read of a file. step: pixels averaged along each side. damaged: whether the rest cannot be read."""

    evidence: Evidence
    step: int
    damaged: bool


def read_frames(path: Path) -> Seen:
    """The frames of a file. Raises `WatermarkError` for a file without a frame that FFmpeg can decode."""
    evidence, step = Evidence(), 1
    fault: Exception | None = None
    try:
        for luma, time_s in _frames(path):
            step = step if evidence.frames else _step(luma.size)
            small = reduced(luma, step) if step > 1 else luma
            if evidence.shape in ((0, 0), small.shape):  # a stream may change its size
                evidence.add(small, time_s)
            if evidence.frames == MOST_FRAMES:
                break
    except FileNotFoundError as error:
        raise WatermarkError(f"{path} does not exist; give a video or a picture.") from error
    except (av.FFmpegError, OSError, ValueError) as error:
        fault = error
    if not evidence.frames:
        reason = getattr(fault, "strerror", None) or "it has no picture"
        raise WatermarkError(f"{path} is no video or picture that can be read ({reason}); give an MP4, JPEG or PNG.")
    return Seen(evidence, step, fault is not None)


def _step(pixels: int) -> int:
    step = 1
    while pixels / step**2 > MOST_PIXELS:
        step += 1
    return step


def _frames(path: Path) -> Iterator[tuple[Array, float]]:
    """Each frame's brightness uint8 [H, W], and its time in seconds."""
    with path.open("rb") as file, av.open(file, "r", options=_OPTIONS, metadata_errors="replace") as container:
        if not container.streams.video:
            return
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        fps = float(stream.average_rate or 25)
        decoded = 0
        for frame in _decoded(container, stream):
            yield frame.to_ndarray(format="gray"), frame.time if frame.pts is not None else decoded / fps
            decoded += 1
        if decoded < stream.frames:
            raise ValueError(f"it ends after {decoded} of {stream.frames} frames")


def _decoded(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """The frames of a stream; where the file ends too early, first those that the decoder still holds."""
    try:
        for packet in container.demux(stream):
            yield from packet.decode()
    except av.FFmpegError:
        yield from stream.decode(None)
        raise
