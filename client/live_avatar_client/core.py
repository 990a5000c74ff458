"""One session without its network: cuts speech into blocks, decides what to send, trims what comes back.

The transports (`sync`, `aio`) feed it and send what `next_request` returns. It knows neither gRPC nor
threads nor asyncio: an operation that may have to wait is a generator (`Steps`) that yields the time
until which nothing can be done unless something changes, and the transport does the waiting.
"""

import math
import secrets
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from .errors import (
    AnswerTimeout,
    ConnectionLost,
    InvalidInput,
    SendTimeout,
    ServerIncompatible,
    SessionClosed,
    SessionFailed,
    SessionRefused,
)
from .protocol import (
    BLOCK_SAMPLES,
    FPS,
    FRAMES_PER_BLOCK,
    MAX_SEQUENCE_ID,
    SAMPLES_PER_FRAME,
    ErrorCode,
    FrameFormat,
    parse_error,
)

Samples: TypeAlias = NDArray[np.int16]
Pixels: TypeAlias = NDArray[np.uint8]

_T = TypeVar("_T")
Steps: TypeAlias = Generator[float, None, _T]
"""An operation that yields the monotonic time at which to go on, unless something changes before."""

_NO_SAMPLES: Samples = np.zeros(0, np.int16)
_SILENCE: Samples = np.zeros(BLOCK_SAMPLES, np.int16)


@dataclass(frozen=True)
class Opening:
    """What the first request of a session carries besides its audio."""

    image: bytes
    prompt: str
    seed: int
    frame_format: FrameFormat


@dataclass(frozen=True)
class Limits:
    """How far a session may run ahead, and how long it waits."""

    max_in_flight_blocks: int
    max_unread_blocks: int
    send_timeout_s: float
    answer_timeout_s: float


@dataclass(frozen=True, eq=False)
class Request:
    """One request to the ensemble; `opening` goes with the START flag."""

    sequence_id: int
    audio: Samples
    opening: Opening | None
    end: bool


@dataclass(frozen=True, eq=False)
class Response:
    """One answer of the ensemble, as it came."""

    frames: Pixels
    jpegs: tuple[bytes, ...]
    first_frame: int


@dataclass(frozen=True, eq=False)
class Block:
    """Consecutive video frames of the speech, at most 12; times are of `time.monotonic`."""

    index: int
    """0 for the first block of the session."""
    first_frame: int
    """The number of the block's first frame; frame 0 shows the speech's first 640 samples."""
    frames: Pixels
    """RGB, [n, height, width, 3], read-only (copy it to draw on it); zero rows when JPEG was asked for."""
    jpegs: tuple[bytes, ...]
    """n encoded frames; empty unless JPEG was asked for."""
    audio_started_at_s: float
    """When the first sample of the block's speech was given to `send`."""
    audio_complete_at_s: float
    """When the last one was."""
    sent_at_s: float
    """When that speech was sent to the server."""
    received_at_s: float
    """When the frames arrived."""

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self.jpegs) or len(self.frames)

    @property
    def timestamps_s(self) -> tuple[float, ...]:
        """When each frame is to be shown, in seconds from the start of the speech."""
        return tuple((self.first_frame + i) / FPS for i in range(len(self)))

    def timed_frames(self) -> Iterator[tuple[float, Pixels]]:
        """Return each frame's timestamp and its pixels [height, width, 3]."""
        if self.jpegs:
            raise InvalidInput("the session's frame_format is 'jpeg'; read Block.jpegs, or ask for 'raw'")
        return zip(self.timestamps_s, self.frames, strict=True)


@dataclass(frozen=True, eq=False)
class SpeechBlock:
    """A whole block of audio, with the times at which its first and last sample were given."""

    samples: Samples
    started_at_s: float
    complete_at_s: float


class BlockCutter:
    """Cuts chunks of any size into blocks of 7,680 samples."""

    def __init__(self) -> None:
        self.samples = 0
        """How many samples were added."""
        self._rest = _NO_SAMPLES
        self._rest_started_at_s = 0.0
        self._rest_complete_at_s = 0.0

    def add(self, chunk: Samples, now_s: float) -> list[SpeechBlock]:
        """Take a chunk, which may be changed afterwards, and return the blocks it completes."""
        if not len(chunk):
            return []
        started_at_s = self._rest_started_at_s if len(self._rest) else now_s
        pending = np.concatenate((self._rest, chunk))
        whole = len(pending) // BLOCK_SAMPLES
        blocks = [
            SpeechBlock(samples, started_at_s if i == 0 else now_s, now_s)
            for i, samples in enumerate(pending[: whole * BLOCK_SAMPLES].reshape(whole, BLOCK_SAMPLES))
        ]
        self.samples += len(chunk)
        self._rest = pending[whole * BLOCK_SAMPLES :].copy()
        self._rest_started_at_s = now_s if whole else started_at_s
        self._rest_complete_at_s = now_s
        return blocks

    def finish(self) -> list[SpeechBlock]:
        """Return the last block, padded with silence, if samples are left."""
        if not len(self._rest):
            return []
        padded = np.pad(self._rest, (0, BLOCK_SAMPLES - len(self._rest)))
        self._rest = _NO_SAMPLES
        return [SpeechBlock(padded, self._rest_started_at_s, self._rest_complete_at_s)]


def as_samples(pcm: object) -> Samples:
    """Return `pcm` as int16: int16 as it is, float32 scaled from [-1, 1], with values beyond clipped."""
    if not isinstance(pcm, np.ndarray):
        raise InvalidInput(
            f"pcm is a {type(pcm).__name__}; pass a numpy array, for raw bytes np.frombuffer(pcm, '<i2')"
        )
    if pcm.ndim != 1:
        raise InvalidInput(f"pcm has the shape {pcm.shape}; pass one dimension of mono samples at 16 kHz")
    if pcm.dtype == np.int16:
        return pcm
    if pcm.dtype != np.float32:
        raise InvalidInput(f"pcm has the type {pcm.dtype}; pass int16, or float32 in [-1, 1]")
    if not np.isfinite(pcm).all():
        at = int(np.argmin(np.isfinite(pcm)))
        raise InvalidInput(f"sample {at} of pcm is {pcm[at]}; pass finite values in [-1, 1]")
    scaled: Samples = np.rint(np.clip(pcm, -1, 32767 / 32768) * 32768).astype(np.int16)
    return scaled


@dataclass(frozen=True)
class _Sent:
    """When a block of speech was given, and sent."""

    started_at_s: float
    complete_at_s: float
    sent_at_s: float


@dataclass(frozen=True)
class _InFlight:
    """A request without an answer yet."""

    has_audio: bool
    sent_at_s: float


class SessionCore:
    """The state of one session. Not thread-safe: the transport serialises the calls."""

    def __init__(self, opening: Opening, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._opening = opening
        self._limits = limits
        self._clock = clock
        self._sequence_id = secrets.randbelow(MAX_SEQUENCE_ID) + 1
        self._cutter = BlockCutter()
        self._outbox: deque[SpeechBlock] = deque()
        self._in_flight: deque[_InFlight] = deque()
        self._unread: deque[Block] = deque()
        self._speech_sent: dict[int, _Sent] = {}
        self._opened = False
        self._started = False
        self._keep_alive_due = False
        self._end_sent = False
        self._blocks_sent = 0
        self._blocks_received = 0
        self._blocks_made = 0
        self._total_frames: int | None = None
        self._lookahead_frames: int | None = None
        self._next_frame = 0
        self._answered_at_s = -math.inf
        self._error: BaseException | None = None

    # What the user asks for

    def open(self) -> None:
        """Allow the operations below; once only."""
        if self._opened:
            raise SessionClosed("the session was opened before; make a new one for each speech")
        self._opened = True

    def send(self, pcm: object, timeout_s: float | None = None) -> Steps[None]:
        """Take a chunk of speech and wait until its whole blocks are on their way.

        Gives up when for `timeout_s` (default: the session's limit) not one block could be sent.
        """
        self._require_speaking()
        self._outbox.extend(self._cutter.add(as_samples(pcm), self._clock()))
        patience_s = self._limits.send_timeout_s if timeout_s is None else timeout_s
        blocks_sent, deadline_s = self._blocks_sent, self._clock() + patience_s
        while self._outbox:
            yield min(deadline_s, self._answer_deadline_s())
            self._require_health()
            if self._blocks_sent != blocks_sent:
                blocks_sent, deadline_s = self._blocks_sent, self._clock() + patience_s
            elif self._clock() >= deadline_s:
                raise self._send_timeout(patience_s)

    def keep_alive(self) -> None:
        """Have a request without samples sent, so that the server does not take a pause for an end."""
        self._require_speaking()
        self._keep_alive_due = True

    def end(self) -> None:
        """Take note that no more speech comes; a second call changes nothing."""
        if self._total_frames is not None:
            return
        self._require_speaking()
        if self._cutter.samples == 0:
            raise InvalidInput("the speech has 0 samples, so there is nothing to say; send() some first")
        self._total_frames = math.ceil(self._cutter.samples / SAMPLES_PER_FRAME)
        self._outbox.extend(self._cutter.finish())

    def next_block(self) -> Steps[Block | None]:
        """Wait for the next block of frames; None after the last one."""
        self._require_open()
        while not self._unread:
            if self.is_complete:
                return None
            self._require_health()
            yield self._answer_deadline_s()
        return self._unread.popleft()

    def fail(self, error: BaseException) -> None:
        """End the session with `error`, unless it is complete or has failed before."""
        if self._error is None and not self.is_complete:
            self._error = error
            self._outbox.clear()

    # What goes to the server

    def next_request(self) -> Request | None:
        """Return the next request that may be sent now, and count it as sent."""
        if self._end_sent:
            return None
        if self._error is not None:
            # The server frees the sequence at END, even if it had refused it.
            return self._request(None, end=True) if self._started else None
        if not self._started:
            # Without waiting for speech: the server gets the picture ready while the first block is spoken.
            return self._request(None, end=False) if self._opened else None
        if self._keep_alive_due:
            self._keep_alive_due = False
            return self._request(None, end=False)
        needed = self._blocks_needed()
        if self._blocks_sent == needed:
            return self._request(None, end=True)
        if not self._may_send_block() or not (self._outbox or needed):
            return None
        audio = self._take_speech() if self._outbox else _SILENCE
        return self._request(audio, end=self._blocks_sent + 1 == needed)

    def _take_speech(self) -> Samples:
        block = self._outbox.popleft()
        self._speech_sent[self._blocks_sent] = _Sent(block.started_at_s, block.complete_at_s, self._clock())
        return block.samples

    def _request(self, audio: Samples | None, *, end: bool) -> Request:
        opening = None if self._started else self._opening
        self._started = True
        self._in_flight.append(_InFlight(audio is not None, self._clock()))
        self._blocks_sent += audio is not None
        self._end_sent = end
        return Request(
            self._sequence_id,
            _NO_SAMPLES if audio is None else audio,
            opening,
            end,
        )

    def _blocks_needed(self) -> int | None:
        """Blocks to send until all frames have come, once the end and the look-ahead are known."""
        if self._total_frames is None or self._lookahead_frames is None:
            return None
        return math.ceil((self._total_frames + self._lookahead_frames) / FRAMES_PER_BLOCK)

    def _may_send_block(self) -> bool:
        waiting = self._blocks_in_flight()
        return (
            waiting < self._limits.max_in_flight_blocks and waiting + len(self._unread) < self._limits.max_unread_blocks
        )

    def _blocks_in_flight(self) -> int:
        return self._blocks_sent - self._blocks_received

    # What comes from the server

    def receive(self, response: Response) -> None:
        """Take an answer. Answers come in the order of the requests."""
        if self._error is not None or self.is_complete:
            return
        if not self._in_flight:
            raise ServerIncompatible("the server sent an answer that belongs to no request")
        self._answered_at_s = self._clock()
        if not self._in_flight.popleft().has_audio:
            return
        self._check(response)
        self._blocks_received += 1
        if self._lookahead_frames is None:
            self._lookahead_frames = -response.first_frame
        self._next_frame = response.first_frame + FRAMES_PER_BLOCK
        first, stop = max(response.first_frame, 0), self._next_frame
        if self._total_frames is not None:
            stop = min(stop, self._total_frames)
        if first < stop:
            self._unread.append(self._block(response, first, stop))

    def receive_error(self, text: str) -> None:
        """Take an error that the server reported."""
        code, message = parse_error(text)
        if self._blocks_received == 0 and code not in (ErrorCode.FAILED, None):
            self.fail(SessionRefused(f"the server refused the session: {message}", code))
        else:
            self.fail(SessionFailed(f"the server ended the session: {message}", code))

    def receive_close(self, reason: str) -> None:
        """Take note that nothing more comes from the server."""
        speech = "" if self._total_frames is None else f" of {self._total_frames}"
        frames = f"{max(self._next_frame, 0)}{speech} frames"
        self.fail(ConnectionLost(f"the stream ended after {frames}: {reason}; open a new session"))

    def _check(self, response: Response) -> None:
        is_jpeg = self._opening.frame_format is FrameFormat.JPEG
        count = len(response.jpegs if is_jpeg else response.frames)
        if count != FRAMES_PER_BLOCK:
            raise ServerIncompatible(
                f"the server answered a block with {count} {self._opening.frame_format} frames, "
                f"expected {FRAMES_PER_BLOCK}"
            )
        if self._lookahead_frames is None:
            if response.first_frame > 0:
                raise ServerIncompatible(
                    f"the server's first answer has FIRST_FRAME {response.first_frame}, expected 0 or less"
                )
        elif response.first_frame != self._next_frame:
            raise ServerIncompatible(
                f"the server's answer has FIRST_FRAME {response.first_frame}, expected {self._next_frame}"
            )

    def _block(self, response: Response, first: int, stop: int) -> Block:
        wanted = slice(first - response.first_frame, stop - response.first_frame)
        # The speech of the last frame; a frame's speech may have been sent before its answer's request.
        speech_block = (stop - 1) // FRAMES_PER_BLOCK
        self._speech_sent.pop(speech_block - 1, None)
        speech = self._speech_sent[speech_block]
        self._blocks_made += 1
        return Block(
            index=self._blocks_made - 1,
            first_frame=first,
            frames=response.frames[wanted],
            jpegs=response.jpegs[wanted],
            audio_started_at_s=speech.started_at_s,
            audio_complete_at_s=speech.complete_at_s,
            sent_at_s=speech.sent_at_s,
            received_at_s=self._answered_at_s,
        )

    # What state the session is in

    @property
    def is_complete(self) -> bool:
        """Whether every frame of the speech has come and the server has been told the end."""
        return self._end_sent and self._total_frames is not None and self._next_frame >= self._total_frames

    def _require_open(self) -> None:
        if not self._opened:
            raise SessionClosed("the session is not open; use it in a `with` (or `async with`) statement")

    def _require_health(self) -> None:
        if self._clock() >= self._answer_deadline_s():
            self.fail(
                AnswerTimeout(
                    f"the server has answered nothing for {self._limits.answer_timeout_s:g} s, with "
                    f"{self._blocks_in_flight()} blocks sent; check the server, or raise answer_timeout_s"
                )
            )
        if self._error is not None:
            raise self._error

    def _require_speaking(self) -> None:
        self._require_open()
        self._require_health()
        if self._total_frames is not None:
            raise SessionClosed("the speech of this session has ended with end(); open a new session")

    def _answer_deadline_s(self) -> float:
        if self._error is not None or not self._in_flight:
            return math.inf
        return max(self._in_flight[0].sent_at_s, self._answered_at_s) + self._limits.answer_timeout_s

    def _send_timeout(self, patience_s: float) -> SendTimeout:
        limits = self._limits
        return SendTimeout(
            f"no block could be sent for {patience_s:g} s: {self._blocks_in_flight()} of at most "
            f"{limits.max_in_flight_blocks} blocks are sent but unanswered, and {len(self._unread)} of at "
            f"most {limits.max_unread_blocks} are answered but unread; read blocks from another thread or "
            "task, for example with stream(), or raise max_in_flight_blocks or max_unread_blocks. The chunk "
            "is kept and goes out when there is room: do not send it again"
        )
