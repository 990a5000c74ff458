"""The messages of a session: what a request and an answer carry, and the blocks that the user reads."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .cutter import Samples
from .errors import InvalidInput
from .protocol import DEFAULT_JPEG_QUALITY, FPS, FRAMES_PER_BLOCK, EndReason, FrameFormat

Pixels: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True)
class Opening:
    """Contents of the first request of a session, in addition to its audio."""

    image: bytes
    prompt: str
    seed: int
    frame_format: FrameFormat
    jpeg_quality: int = DEFAULT_JPEG_QUALITY
    label: str = ""
    masks: tuple[bytes, ...] = ()
    """One for each of several speakers."""
    frames_per_response: int = FRAMES_PER_BLOCK

    @property
    def speakers(self) -> int:
        """How many speak; one without masks."""
        return max(1, len(self.masks))


@dataclass(frozen=True, eq=False)
class Request:
    """One request to the ensemble; `opening` goes with the START flag, `end` with the END flag.

    `audio` is int16 [samples], of several speakers [speakers, samples].
    """

    sequence_id: int
    token: str
    audio: Samples
    opening: Opening | None
    end: EndReason | None


@dataclass(frozen=True, eq=False)
class Response:
    """One unchanged answer of the ensemble."""

    frames: Pixels
    jpegs: tuple[bytes, ...]
    first_frame: int
    provenance: dict[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class Block:
    """Consecutive video frames, at most 12; times are of `time.monotonic`."""

    index: int
    """0 for the first block of the session."""
    first_frame: int
    """The number of the block's first frame; frame 0 shows the first 640 samples that were sent."""
    frames: Pixels
    """RGB, [n, height, width, 3], read-only (copy before changing it); zero rows if JPEG was requested."""
    jpegs: tuple[bytes, ...]
    """n encoded frames; empty unless JPEG was requested."""
    audio: Samples
    """Audio of the frames, int16 [n * 640] at 16 kHz, with the silence around the speech; of several speakers
    [speakers, n * 640]."""
    stale: bool
    """Whether the frames show speech from before an `interrupt()`; a player should skip them."""
    audio_started_at_s: float
    """When the first sample of the block's speech was given to `send`."""
    audio_complete_at_s: float
    """When the last sample of the block's speech was given to `send`."""
    sent_at_s: float
    """When that speech was sent to the server."""
    received_at_s: float
    """When the frames arrived."""

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self.jpegs) or len(self.frames)

    @property
    def timestamps_s(self) -> tuple[float, ...]:
        """Time of each frame, in seconds from frame 0."""
        return tuple((self.first_frame + i) / FPS for i in range(len(self)))

    def timed_frames(self) -> Iterator[tuple[float, Pixels]]:
        """Return each frame's timestamp and its pixels [height, width, 3]."""
        if self.jpegs:
            raise InvalidInput("the session's frame_format is 'jpeg'; read Block.jpegs, or ask for 'raw'")
        return zip(self.timestamps_s, self.frames, strict=True)
