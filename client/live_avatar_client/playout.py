"""Decides what an agent's avatar shows and sounds next: speech in, pairs of picture and sound out.

It does no I/O; `conversation` connects it with a session. It counts in frames of 40 ms. Speech comes at any sample
rate, as fast as it is made. The server gets it at 16 kHz; the player gets it at the rate that the player needs, as it
came if that is the same.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Final

import numpy as np

try:
    import soxr
except ImportError as error:
    raise ImportError(
        "live_avatar_client.playout needs soxr; install it with: pip install 'live-avatar-client[livekit]' or [pipecat]"
    ) from error

from .cutter import NO_SAMPLES, Samples, silence
from .errors import InvalidInput
from .messages import Block, Pixels
from .pacing import SPEECH_GAP_S
from .protocol import BLOCK_SAMPLES, FPS, FRAMES_PER_BLOCK, SAMPLE_RATE_HZ

MIN_RATE_HZ: Final = 4_000
MAX_RATE_HZ: Final = 768_000

IDLE_MARGIN_FRAMES: Final = 3
"""An idle avatar's next block is sent when this many frames are left beyond the server's latency."""
SPEECH_MARGIN_FRAMES: Final = 12
"""The same for speech. More would survive longer stalls, and make an interruption wait for more stale frames."""
_FIRST_LATENCY_FRAMES: Final = 12.0
_NEW_WEIGHT: Final = 0.5
"""Weight of the newest block in the mean latency."""


@dataclass(frozen=True, eq=False)
class Tick:
    """What 40 ms of the conversation look and sound like."""

    pixels: Pixels | None
    """RGB, [height, width, 3]; None for sound that has lost its picture, as the session has failed."""
    sound: Samples | None
    """The speech of the frame, int16 [n], n at most a 25th of the sound's rate; None while nobody speaks."""


@dataclass(frozen=True, eq=False)
class Mark:
    """Something that has its place in the speech, such as the end of a segment; it follows the sound before it."""

    content: object


@dataclass(frozen=True, eq=False)
class SpokenBlock:
    """A block of speech for the server, int16 [7680], and the sound of its first frames for the player."""

    speech: Samples
    sounds: tuple[Samples, ...]


def mono(pcm: bytes | memoryview, channels: int) -> Samples:
    """Return the mean of interleaved int16 channels; raise InvalidInput for bytes that are not whole samples."""
    size = len(memoryview(pcm).cast("B"))
    if channels < 1 or size % (2 * channels):
        raise InvalidInput(
            f"the audio has {size} bytes in {channels} channels; pass int16 samples, 2 bytes for each channel"
        )
    samples = np.frombuffer(pcm, "<i2")
    if channels == 1:
        return samples
    mean: Samples = samples.reshape(-1, channels).mean(axis=1).round().astype(np.int16)
    return mean


class _Voice:
    """Resamples one run of speech, and cuts it into blocks."""

    def __init__(self, rate_hz: int, sound_rate_hz: int) -> None:
        self.rate_hz = rate_hz
        self._sound_rate_hz = sound_rate_hz
        self._to_server = _resampler(rate_hz, SAMPLE_RATE_HZ)
        self._to_player = _resampler(rate_hz, sound_rate_hz)
        self._given = 0
        self._cut_frames = 0
        self._speech = self._sound = NO_SAMPLES

    @property
    def frames_ahead(self) -> int:
        """How many frames the samples that are not cut yet will fill."""
        return math.ceil(self._given * FPS / self.rate_hz) - self._cut_frames

    def add(self, pcm: Samples, *, last: bool = False) -> list[SpokenBlock]:
        """Take samples at `rate_hz` and return the blocks that are whole; all that is left, padded, with `last`."""
        self._given += len(pcm)
        self._speech = np.concatenate((self._speech, _resampled(self._to_server, pcm, last)))
        self._sound = np.concatenate((self._sound, _resampled(self._to_player, pcm, last)))
        frame_samples = self._sound_rate_hz // FPS
        blocks = []
        while len(self._sound) if last else self._has_block():
            sound, self._sound = np.split(self._sound, [frame_samples * FRAMES_PER_BLOCK])
            speech, self._speech = np.split(self._speech, [BLOCK_SAMPLES])
            sounds = tuple(sound[i : i + frame_samples] for i in range(0, len(sound), frame_samples))
            blocks.append(SpokenBlock(np.pad(speech, (0, BLOCK_SAMPLES - len(speech))), sounds))
            self._cut_frames += len(sounds)
        return blocks

    def _has_block(self) -> bool:
        # The filters hold back samples of different lengths.
        return len(self._speech) >= BLOCK_SAMPLES and len(self._sound) >= self._sound_rate_hz // FPS * FRAMES_PER_BLOCK


class Playout:
    """The state of one conversation: speech that waits, frames that were asked for, and what is to be played next.

    Speech between two ends or interrupts is a run. Each frame of the session has its place in `_plan` from the time
    when it is asked for until it is played.
    """

    def __init__(self, sound_rate_hz: int) -> None:
        """Take the rate of the sound that is played; raise InvalidInput if 40 ms of it are no whole samples."""
        require_sound_rate(sound_rate_hz)
        self.lookahead_frames = 0
        """How far the server's frames lag behind the speech that was sent."""
        self._sound_rate_hz = sound_rate_hz
        self._latency_frames = _FIRST_LATENCY_FRAMES
        self._voice: _Voice | None = None
        self._spoken_at_s = -math.inf
        self._blocks: deque[SpokenBlock] = deque()
        self._blocks_sent = 0
        self._plan: deque[Samples | None] = deque()
        self._pixels: deque[Pixels] = deque()
        self._next_frame = 0
        self._marks: deque[tuple[int, Mark]] = deque()
        """Each with the number of frames of speech after which it is due."""
        self._cut_frames = 0
        self._played_frames = 0
        self._failed = False

    @property
    def is_speaking(self) -> bool:
        """Whether speech or marks wait to be played."""
        return self._voice is not None or self._played_frames < self._cut_frames or bool(self._marks)

    # Speech

    def push(self, pcm: Samples, rate_hz: int, now_s: float) -> None:
        """Add speech, mono; another rate than before begins a new run."""
        require_rate(rate_hz)
        if not len(pcm):
            return
        if self._voice is not None and self._voice.rate_hz != rate_hz:
            self.finish()
        if self._voice is None:
            self._voice = _Voice(rate_hz, self._sound_rate_hz)
        self._spoken_at_s = now_s
        self._take(self._voice.add(pcm))

    def finish(self) -> None:
        """End the run: the last frames need no more speech."""
        if self._voice is None:
            return
        self._take(self._voice.add(NO_SAMPLES, last=True))
        self._voice = None
        self._marks = deque((min(due, self._cut_frames), mark) for due, mark in self._marks)

    def mark(self, content: object) -> None:
        """Place a mark behind the speech that was pushed so far."""
        ahead = 0 if self._voice is None else self._voice.frames_ahead
        self._marks.append((self._cut_frames + ahead, Mark(content)))

    def interrupt(self) -> list[Mark]:
        """Drop all speech that was not played, and its frames; return the marks that were dropped with it."""
        dropped = [mark for _, mark in self._marks]
        self._voice = None
        self._blocks.clear()
        self._marks.clear()
        self._cut_frames = self._played_frames
        # Frames of silence go on: most interruptions come while nobody speaks, and the picture must not freeze then.
        if any(sound is not None for sound in self._plan):
            self._plan.clear()
            self._pixels.clear()
            self._next_frame = self._blocks_sent * FRAMES_PER_BLOCK
        return dropped

    # The session

    def next_block(self, now_s: float) -> SpokenBlock | None:
        """Return the block that is to be sent now: speech, else silence; `sent` must follow."""
        is_paused = self._voice is None or now_s - self._spoken_at_s >= SPEECH_GAP_S
        if self._failed:
            if is_paused:
                self.finish()
            return None
        beyond = len(self._plan) - self._latency_frames - self.lookahead_frames
        if not self._blocks and beyond <= IDLE_MARGIN_FRAMES and is_paused:
            self.finish()
            if not self._blocks:
                return SpokenBlock(silence(BLOCK_SAMPLES), ())
        return self._blocks[0] if self._blocks and beyond <= SPEECH_MARGIN_FRAMES else None

    def sent(self, block: SpokenBlock) -> None:
        """Note that a block was sent."""
        if self._blocks and self._blocks[0] is block:
            self._blocks.popleft()
        self._blocks_sent += 1
        self._plan.extend(block.sounds)
        self._plan.extend([None] * (FRAMES_PER_BLOCK - len(block.sounds)))

    def receive(self, block: Block) -> None:
        """Take the frames of a block; those from before an interrupt are dropped."""
        latency_frames = (block.received_at_s - block.sent_at_s) * FPS
        self._latency_frames += _NEW_WEIGHT * (latency_frames - self._latency_frames)
        stale = self._next_frame + len(self._pixels) - block.first_frame
        self._pixels.extend(block.frames[max(stale, 0) :])

    def fail(self) -> None:
        """Go on without pictures: the session has ended."""
        self._failed = True
        self._pixels.clear()
        self._plan = deque(sound for sound in self._plan if sound is not None)
        blocks, self._blocks = self._blocks, deque()
        for block in blocks:
            self._plan.extend(block.sounds)

    # The player

    def next_item(self) -> Tick | Mark | None:
        """Return what comes next, or None if it has not arrived yet."""
        if self._marks and self._marks[0][0] <= self._played_frames:
            return self._marks.popleft()[1]
        if not self._plan or not (self._pixels or self._failed):
            return None
        sound = self._plan.popleft()
        self._next_frame += 1
        self._played_frames += sound is not None
        return Tick(None if self._failed else self._pixels.popleft(), sound)

    def _take(self, blocks: list[SpokenBlock]) -> None:
        self._cut_frames += sum(len(block.sounds) for block in blocks)
        if self._failed:
            self._plan.extend(sound for block in blocks for sound in block.sounds)
        else:
            self._blocks.extend(blocks)


def require_rate(rate_hz: int) -> None:
    """Raise InvalidInput for a sample rate that speech does not have."""
    if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
        raise InvalidInput(f"the audio has a rate of {rate_hz} Hz; pass {MIN_RATE_HZ} to {MAX_RATE_HZ} Hz")


def require_sound_rate(rate_hz: int) -> None:
    """Raise InvalidInput unless 40 ms of sound at this rate are whole samples."""
    require_rate(rate_hz)
    if rate_hz % FPS:
        raise InvalidInput(f"the sound's rate is {rate_hz} Hz; pass a multiple of {FPS}, such as 16000, 24000 or 48000")


def _resampler(rate_hz: int, wanted_hz: int) -> "soxr.ResampleStream | None":
    return None if rate_hz == wanted_hz else soxr.ResampleStream(rate_hz, wanted_hz, 1, dtype="int16")


def _resampled(resampler: "soxr.ResampleStream | None", pcm: Samples, last: bool) -> Samples:
    return pcm if resampler is None else resampler.resample_chunk(np.ascontiguousarray(pcm, np.int16), last=last)
