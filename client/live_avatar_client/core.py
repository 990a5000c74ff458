"""The state machine of one session: decides what to send and when, and trims the frames that arrive.

It does no I/O. The transports (`sync`, `aio`) pass answers in and send what `next_request` returns. An operation
that may wait is a generator (`Steps`): it yields a deadline, and the transport waits until the deadline or until
the session changes.
"""

import math
import secrets
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias, TypeVar

import numpy as np

from .cutter import NO_SAMPLES, BlockCutter, Samples, SpeechBlock, silent_block
from .errors import (
    AnswerTimeout,
    AvatarError,
    ConnectionLost,
    InvalidInput,
    SendTimeout,
    ServerIncompatible,
    SessionBusy,
    SessionClosed,
    SessionFailed,
    SessionRefused,
)
from .messages import Block, Opening, Request, Response
from .pacing import PlaybackClock
from .protocol import (
    BLOCK_SAMPLES,
    FRAMES_PER_BLOCK,
    MAX_LOOKAHEAD_FRAMES,
    MAX_SEQUENCE_ID,
    SAMPLES_PER_FRAME,
    EndReason,
    ErrorCode,
    FrameFormat,
    explain_error,
    parse_error,
)
from .speakers import speech_of
from .text import MAX_TEXT_CHARS, printable

_T = TypeVar("_T")
Steps: TypeAlias = Generator[float, None, _T]
"""An operation that yields a deadline in monotonic time; it resumes then, or earlier when the session changes."""

_TOKEN_BYTES: Final = 16


@dataclass(frozen=True)
class Limits:
    """Limits of a session: blocks ahead, waiting times, and time without a request."""

    max_in_flight_blocks: int
    max_unread_blocks: int
    send_timeout_s: float
    answer_timeout_s: float
    keep_alive_s: float = math.inf


@dataclass(frozen=True, eq=False)
class _Sent:
    """A block of audio, and when it was sent."""

    block: SpeechBlock
    sent_at_s: float


@dataclass(frozen=True)
class _InFlight:
    """A request without an answer yet."""

    has_audio: bool
    sent_at_s: float


class SessionCore:
    """The state of one session. Not thread-safe: the transport serialises the calls.

    With `idle` it sends silence at playback pace while there is no speech.
    """

    def __init__(
        self,
        opening: Opening,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
        *,
        idle: bool = False,
    ) -> None:
        self.provenance: dict[str, Any] | None = None
        """Provenance of the video, once the server has sent it."""
        self.lookahead_frames: int | None = None
        """How many frames the answers lag behind the audio, known with the first one."""
        self._opening = opening
        self._limits = limits
        self._clock = clock
        self._sequence_id = secrets.randbelow(MAX_SEQUENCE_ID) + 1
        self._token = secrets.token_hex(_TOKEN_BYTES)
        self._cutter = BlockCutter(opening.speakers)
        self._playback = PlaybackClock(clock()) if idle else None
        self._outbox: deque[SpeechBlock] = deque()
        self._in_flight: deque[_InFlight] = deque()
        self._unread: deque[Block] = deque()
        self._sent: dict[int, _Sent] = {}
        self._opened = False
        self._started = False
        self._end_sent = False
        self._idles = False  # whether the latest block sent was silence
        self._keep_alive_at_s = math.inf
        self._interrupts = 0
        self._blocks_sent = 0
        self._blocks_received = 0
        self._blocks_made = 0
        self._speech_frames = 0  # number of frames up to the last one with speech that was sent
        self._stale_frames = 0  # number of frames up to the last stale one
        self._total_frames: int | None = None
        self._frame_size: tuple[int, ...] | None = None
        self._next_frame = 0
        self._answered_at_s = -math.inf
        self._error: BaseException | None = None

    # Operations of the user

    def open(self) -> None:
        """Open the session; allowed once."""
        if self._opened:
            raise SessionClosed("the session was opened before; make a new one for each speech")
        self._opened = True
        if self._playback:
            self._playback.restart(self._clock())

    def send(
        self, pcm: object, timeout_s: float | None = None, *, speaker: int | None = None, wait: bool = True
    ) -> Steps[None]:
        """Take a chunk of speech and wait until its whole blocks are sent or dropped by an interrupt.

        `speaker` tells whose speech it is, if there are several; a mapping names the speakers itself.

        Raises SendTimeout when no block could be sent for `timeout_s` (default: the session's limit). With
        `wait=False`, raises SessionBusy and takes nothing if not all blocks can be sent now.
        """
        self._require_speaking()
        chunk = speech_of(pcm, speaker, self._opening.speakers)
        if not wait:
            self._require_room(chunk)
        self._take(chunk)
        patience_s = self._limits.send_timeout_s if timeout_s is None else timeout_s
        interrupts = self._interrupts
        blocks_sent, deadline_s = self._blocks_sent, self._clock() + patience_s
        while wait and self._outbox and self._interrupts == interrupts:
            yield min(deadline_s, self._answer_deadline_s())
            self._require_health()
            if self._blocks_sent != blocks_sent:
                blocks_sent, deadline_s = self._blocks_sent, self._clock() + patience_s
            elif self._clock() >= deadline_s:
                raise self._send_timeout(patience_s)

    def interrupt(self) -> None:
        """Drop the speech that was not sent, and mark the frames of sent speech as stale."""
        self._require_speaking()
        self._interrupts += 1
        self._outbox.clear()
        self._cutter.drop_rest()
        self._stale_frames = self._blocks_sent * FRAMES_PER_BLOCK
        self._unread = deque(replace(block, stale=True) for block in self._unread)
        if self._playback:
            self._playback.interrupted(self._clock())

    def keep_alive(self) -> None:
        """Make a request without samples due, so that the server does not drop the session in a pause."""
        self._require_speaking()
        self._keep_alive_at_s = -math.inf

    def end(self) -> None:
        """Mark the speech as complete; a second call changes nothing.

        The video ends with the last speech. Frames of later idle silence are dropped if they were not read.
        """
        if self._total_frames is not None:
            return
        self._require_speaking()
        if self._cutter.samples == 0 and self._playback is None:
            raise InvalidInput("the speech has 0 samples, so there is nothing to say; send() some first")
        self._outbox.extend(self._cutter.finish())
        self._total_frames = self._speech_frames
        if self._outbox:
            number = self._blocks_sent + len(self._outbox) - 1
            self._total_frames = _speech_stop(number, self._outbox[-1])
        self._unread = deque(
            _first_frames(block, self._total_frames - block.first_frame)
            for block in self._unread
            if block.first_frame < self._total_frames
        )

    def next_block(self) -> Steps[Block | None]:
        """Wait for the next block of frames; None after the last one."""
        self._require_open()
        while not self._unread:
            if self.is_complete:
                return None
            self._require_health()
            yield self._answer_deadline_s()
        return self._unread.popleft()

    def keep_time(self) -> Steps[None]:
        """Wait for the times of idle silence and keep-alives, until END is sent."""
        while not self._end_sent:
            yield min(self._silence_at_s(), self._keep_alive_at_s)

    def fail(self, error: BaseException) -> None:
        """End the session with `error`, unless it is complete or has failed before."""
        if self._error is None and not self.is_complete:
            self._error = error
            self._outbox.clear()

    def _take(self, chunk: Samples) -> None:
        self._outbox.extend(self._cutter.add(chunk, self._clock()))
        if self._playback and chunk.shape[-1]:
            self._playback.speech_given(self._clock())

    # Requests

    def next_request(self) -> Request | None:
        """Return the next request that may be sent now, and count it as sent."""
        if self._end_sent:
            return None
        if self._error is not None:
            # The server frees the sequence at END, even if it had refused it.
            return self._request(end=self._reason_of(self._error)) if self._started else None
        if not self._started:
            # START does not wait for speech: the server prepares the picture while the first block is spoken.
            return self._request() if self._opened else None
        needed = self._blocks_needed()
        if needed is not None and self._blocks_sent >= needed:
            return self._request(end=EndReason.COMPLETED)
        if block := self._next_audio(needed):
            is_last = self._blocks_sent + 1 == needed
            return self._request(block, end=EndReason.COMPLETED if is_last else None)
        return self._request() if self._clock() >= self._keep_alive_at_s else None

    def _next_audio(self, needed: int | None) -> SpeechBlock | None:
        """Return the block of audio that may be sent now: speech, else silence if it is due."""
        if not self._may_send_block():
            return None
        if self._outbox:
            return self._outbox.popleft()
        if needed is not None:
            return silent_block(self._clock(), self._opening.speakers)
        now_s = self._clock()
        if now_s < self._silence_at_s():
            return None
        if now_s >= self._beginning_at_s():
            return self._cutter.begin()
        rest = self._cutter.finish()
        return rest[0] if rest else silent_block(now_s, self._opening.speakers)

    def _silence_at_s(self) -> float:
        """Return when silence (or the rest of the speech) is due for an idle avatar; infinity if it is not."""
        is_busy = self._outbox or self._total_frames is not None or not self._may_send_block()
        if self._playback is None or is_busy:
            return math.inf
        return min(self._playback.silence_at_s(), self._beginning_at_s())

    def _beginning_at_s(self) -> float:
        """Return when the beginning of a speech is due, as the end of a silent block.

        Speech that is just being spoken fills its block later than the player needs one. A whole block of speech
        would show its first frame no sooner, and the video would stop until then. Speech that comes faster than it is
        spoken is better sent in whole blocks.
        """
        if self._playback is None or not self._idles:
            return math.inf
        return max(self._playback.due_at_s, self._cutter.live_at_s())

    def _request(self, block: SpeechBlock | None = None, *, end: EndReason | None = None) -> Request:
        now_s = self._clock()
        opening = None if self._started else self._opening
        self._started = True
        self._in_flight.append(_InFlight(block is not None, now_s))
        self._end_sent = end is not None
        self._keep_alive_at_s = now_s + self._limits.keep_alive_s
        if block:
            self._note_sent(block, now_s)
        return Request(self._sequence_id, self._token, block.samples if block else NO_SAMPLES, opening, end)

    def _note_sent(self, block: SpeechBlock, now_s: float) -> None:
        number = self._blocks_sent
        self._sent[number] = _Sent(block, now_s)
        self._idles = block.speech_samples == 0
        if block.speech_samples:
            self._speech_frames = _speech_stop(number, block)
        self._blocks_sent += 1
        if self._playback:
            self._playback.block_sent(now_s)

    def _blocks_needed(self) -> int | None:
        """Return how many blocks all frames need; None until the end and the look-ahead are known."""
        if self._total_frames == 0:
            return 0
        if self._total_frames is None or self.lookahead_frames is None:
            return None
        return math.ceil((self._total_frames + self.lookahead_frames) / FRAMES_PER_BLOCK)

    def _may_send_block(self) -> bool:
        return self._room_blocks() > 0

    def _room_blocks(self) -> int:
        """Return how many blocks may be sent now."""
        waiting = self._blocks_in_flight()
        limits = self._limits
        return min(limits.max_in_flight_blocks - waiting, limits.max_unread_blocks - waiting - self._unread_blocks())

    def _unread_blocks(self) -> int:
        """Return how many blocks are answered and not read. `_unread` has a part of a block for each response."""
        responses_per_block = FRAMES_PER_BLOCK // self._opening.frames_per_response
        return math.ceil(len(self._unread) / responses_per_block)

    def _blocks_in_flight(self) -> int:
        return self._blocks_sent - self._blocks_received

    def _reason_of(self, error: BaseException) -> EndReason:
        """Return ABANDONED if the application closed the session or raised an error, else FAILED."""
        is_ours = isinstance(error, AvatarError) and not isinstance(error, SessionClosed)
        return EndReason.FAILED if is_ours else EndReason.ABANDONED

    # Answers

    def receive(self, response: Response) -> None:
        """Process an answer. Answers come in the order of the requests."""
        if self.has_failed or self.is_complete:
            return
        if not self._in_flight:
            raise ServerIncompatible("the server sent an answer that belongs to no request")
        self._answered_at_s = self._clock()
        self.provenance = self.provenance or response.provenance
        if not self._in_flight[0].has_audio:
            self._in_flight.popleft()
            return
        self._check(response)
        if self.lookahead_frames is None:
            self.lookahead_frames = -response.first_frame
        self._next_frame = response.first_frame + self._opening.frames_per_response
        if (self._next_frame + self.lookahead_frames) % FRAMES_PER_BLOCK == 0:  # the last response of the block
            self._in_flight.popleft()
            self._blocks_received += 1
        first, stop = max(response.first_frame, 0), self._next_frame
        if self._total_frames is not None:
            stop = min(stop, self._total_frames)
        # With look-ahead, one answer can hold the last frames before an interrupt and the first after it.
        border = min(max(first, self._stale_frames), stop)
        for begin, end in ((first, border), (border, stop)):
            if begin < end:
                self._unread.append(self._block(response, begin, end))
        self._forget_sent()

    def receive_error(self, text: str) -> None:
        """Process an error that the server reported."""
        code, message = parse_error(text[:MAX_TEXT_CHARS])
        message = printable(message)
        if self.lookahead_frames is None and code not in (ErrorCode.FAILED, None):
            self.fail(SessionRefused(f"the server refused the session: {message}", code))
        else:
            self.fail(SessionFailed(f"the server ended the session: {explain_error(message)}", code))

    def receive_close(self, reason: str) -> None:
        """Process the end of the stream."""
        speech = "" if self._total_frames is None else f" of {self._total_frames}"
        frames = f"{max(self._next_frame, 0)}{speech} frames"
        self.fail(ConnectionLost(f"the stream ended after {frames}: {reason}; open a new session"))

    def _check(self, response: Response) -> None:
        is_jpeg = self._opening.frame_format is FrameFormat.JPEG
        count = len(response.jpegs if is_jpeg else response.frames)
        if count != self._opening.frames_per_response:
            raise ServerIncompatible(
                f"the server answered a block with {count} {self._opening.frame_format} frames, "
                f"expected {self._opening.frames_per_response}"
            )
        size = response.frames.shape[1:3]
        if not is_jpeg and (0 in size or self._frame_size not in (None, size)):
            raise ServerIncompatible(
                f"the server answered a block with frames of {_size_name(size)} pixels, expected "
                f"{_size_name(self._frame_size) if self._frame_size else 'at least 1x1'}"
            )
        self._frame_size = size
        if self.lookahead_frames is None:
            if not -MAX_LOOKAHEAD_FRAMES <= response.first_frame <= 0:
                raise ServerIncompatible(
                    f"the server's first answer has FIRST_FRAME {response.first_frame}, expected "
                    f"{-MAX_LOOKAHEAD_FRAMES} to 0"
                )
        elif response.first_frame != self._next_frame:
            raise ServerIncompatible(
                f"the server's answer has FIRST_FRAME {response.first_frame}, expected {self._next_frame}"
            )

    def _block(self, response: Response, first: int, stop: int) -> Block:
        wanted = slice(first - response.first_frame, stop - response.first_frame)
        # The speech of the last frame; a frame's speech may have been sent before its answer's request.
        last = self._sent[(stop - 1) // FRAMES_PER_BLOCK]
        self._blocks_made += 1
        return Block(
            index=self._blocks_made - 1,
            first_frame=first,
            frames=response.frames[wanted],
            jpegs=response.jpegs[wanted],
            audio=self._audio(first, stop),
            stale=first < self._stale_frames,
            audio_started_at_s=last.block.started_at_s,
            audio_complete_at_s=last.block.complete_at_s,
            sent_at_s=last.sent_at_s,
            received_at_s=self._answered_at_s,
        )

    def _audio(self, first: int, stop: int) -> Samples:
        """Return the samples that were sent for frames `first` to `stop`."""
        first_block, last_block = first // FRAMES_PER_BLOCK, (stop - 1) // FRAMES_PER_BLOCK
        blocks = [self._sent[n].block.samples for n in range(first_block, last_block + 1)]
        sent: Samples = np.concatenate(blocks, axis=-1)
        start = first * SAMPLES_PER_FRAME - first_block * BLOCK_SAMPLES
        return sent[..., start : start + (stop - first) * SAMPLES_PER_FRAME]

    def _forget_sent(self) -> None:
        """Forget the audio whose frames have all arrived."""
        oldest_needed = self._next_frame // FRAMES_PER_BLOCK
        while self._sent and (oldest := next(iter(self._sent))) < oldest_needed:
            del self._sent[oldest]

    # State

    @property
    def has_failed(self) -> bool:
        """Whether the session has ended with an error."""
        return self._error is not None

    @property
    def is_complete(self) -> bool:
        """Whether every frame of the speech has arrived and END was sent."""
        return self._end_sent and self._total_frames is not None and max(self._next_frame, 0) >= self._total_frames

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

    def _require_room(self, chunk: Samples) -> None:
        """Raise SessionBusy unless the blocks that the chunk completes can all be sent now."""
        blocks, room = self._cutter.blocks_completed_by(chunk), max(self._room_blocks() - len(self._outbox), 0)
        if blocks > room:
            raise SessionBusy(
                f"the chunk completes {blocks} blocks, and {room} can be sent now: {self._waiting()}; read blocks "
                "and send it again, in smaller chunks if it never fits, or send with wait=True. Nothing was taken"
            )

    def _answer_deadline_s(self) -> float:
        if self._error is not None or not self._in_flight:
            return math.inf
        return max(self._in_flight[0].sent_at_s, self._answered_at_s) + self._limits.answer_timeout_s

    def _send_timeout(self, patience_s: float) -> SendTimeout:
        return SendTimeout(
            f"no block could be sent for {patience_s:g} s: {self._waiting()}; read blocks from another thread or "
            "task, for example with stream(), or raise max_in_flight_blocks or max_unread_blocks. The chunk "
            "is kept and goes out when there is room: do not send it again"
        )

    def _waiting(self) -> str:
        limits = self._limits
        return (
            f"{self._blocks_in_flight()} of at most {limits.max_in_flight_blocks} blocks are sent but unanswered, "
            f"and {self._unread_blocks()} of at most {limits.max_unread_blocks} are answered but unread"
        )


def _speech_stop(number: int, block: SpeechBlock) -> int:
    """Return the number of the first frame after the speech of block `number`."""
    return number * FRAMES_PER_BLOCK + math.ceil(block.speech_samples / SAMPLES_PER_FRAME)


def _size_name(size: tuple[int, ...]) -> str:
    height, width = size
    return f"{width}x{height}"


def _first_frames(block: Block, count: int) -> Block:
    """Return the block with its first `count` frames."""
    if count >= len(block):
        return block
    audio = block.audio[..., : count * SAMPLES_PER_FRAME]
    return replace(block, frames=block.frames[:count], jpegs=block.jpegs[:count], audio=audio)
