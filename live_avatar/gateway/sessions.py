"""One session: its requests go to Triton in order and at its turn, and the answers come back in the same order."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

import grpc

from live_avatar.arrays import Array
from live_avatar.errors import InputError, ShutdownError
from live_avatar.gateway.audit import SessionRecord
from live_avatar.gateway.context import Caller, SessionContext
from live_avatar.gateway.frames import Place, ask_for_place
from live_avatar.gateway.opening import Opening, note_refused, open_session
from live_avatar.gateway.pipe import Closed, PipeStream
from live_avatar.gateway.requests import (
    CallerRequest,
    Message,
    end_request,
    error_response,
    response_error,
    triton_request,
)
from live_avatar.serving import metrics
from live_avatar.serving.failures import PipeError, describe
from live_avatar.serving.metrics import EndCause, RefusalReason
from live_avatar.serving.tensors import (
    NO_BLOCK,
)
from live_avatar_client import protocol
from live_avatar_client.protocol import (
    FRAMES_PER_BLOCK,
    EndReason,
    ErrorCode,
    FrameFormat,
    explain_error,
    format_error,
    parse_error,
)

log = logging.getLogger(__name__)

GATEWAY: Final = "gateway"
PLACE_LIMIT_S: Final = 5.0
"""How long the last answer may wait until the session's place is free."""
CLOSE_LIMIT_S: Final = 30.0
"""How long Triton may take to answer what is under way when a session ends; then its place is free in any case."""
# A gateway that was started again must not meet the sequences of the one before it.
_sequence_ids = itertools.count(secrets.randbits(40) << 20 | 1)

Write = Callable[[bytes], Awaitable[None]]


@dataclass(frozen=True)
class _Expected:
    """What is due to a request, without what it held. text: an error that the gateway gives itself; None for answers
    of Triton. end: the cause of the end that the request asks for. before: answers of Triton that come before those for
    the caller. answers: how many those are, which share the place; an error is the last one."""

    request_id: str
    is_block: bool = False
    start: bool = False
    end: EndCause | None = None
    text: str | None = None
    place: Place | None = None
    before: int = 0
    answers: int = 1

    @classmethod
    def of(cls, request: CallerRequest, text: str | None = None) -> _Expected:
        end = _requested_cause(request) if request.end else None
        return cls(request.request_id, request.is_block, request.start, end, text)


class Session:
    """A session of one caller's stream, from the request with START on.

    `failure` is the error for further requests, once the session cannot go on.
    """

    def __init__(self, id_: int, caller: Caller, context: SessionContext, write: Write) -> None:
        self.id = id_
        self.sequence = next(_sequence_ids)
        self.failure: str | None = None
        self._caller = caller
        self._context = context
        self._write = write
        limits = context.limits
        self._requests: asyncio.Queue[CallerRequest | _Expected] = asyncio.Queue(limits.queued_blocks)
        self._expected: asyncio.Queue[_Expected] = asyncio.Queue(limits.lone_blocks + limits.queued_blocks)
        self._stream: PipeStream | None = None
        self._record: SessionRecord | None = None
        self._is_raw = False
        self._answers_per_block = 1
        self._places: set[Place] = set()
        self._end_sent = False
        self._closing: asyncio.Task[None] | None = None
        self._end_asked: EndCause | None = None
        self._is_refused = False
        self._has_ended = False
        self._unanswered = 0
        self._all_answered = asyncio.Event()
        self._used_s = self._began_s = time.monotonic()
        self._waiting_since_s: float | None = None
        self._writing_since_s: float | None = None
        self._tasks = [asyncio.create_task(self._guarded(work)) for work in (self._forward(), self._return())]

    @property
    def is_ending(self) -> bool:
        """Whether END has come, after which the session takes no request."""
        return self._end_asked is not None

    @property
    def is_over(self) -> bool:
        """Whether the caller needs it no more: END or a START that was refused is answered, and all else."""
        return self._has_ended and self._unanswered == 0

    async def put(self, request: CallerRequest) -> None:
        """Takes a request; waits while too many of the session's are queued."""
        self._note_unanswered()
        if request.end:
            self._end_asked = _requested_cause(request)
        text = self._misplaced(request)
        await self._requests.put(request if text is None else _Expected.of(request, text))

    async def refuse(self, request_id: str, error: Exception) -> None:
        """Answers a request with an error, at its turn; the session goes on. Waits as `put` does."""
        self._note_unanswered()
        await self._requests.put(_Expected(request_id, text=self._text(error)))

    async def wait_answered(self) -> None:
        """Returns when every request has its answer."""
        await self._all_answered.wait()

    def overdue(self, now_s: float) -> tuple[EndCause, str] | None:
        """Why the session must end now without an error for a request: the cause and a sentence."""
        idle_s = self._context.limits.idle_s
        if self._unanswered == 0 and now_s - self._used_s > idle_s:
            return EndCause.SILENT, f"session {self.id} was silent for more than {idle_s:g} s, so it has ended"
        if self._writing_since_s is not None and now_s - self._writing_since_s > idle_s:
            return (
                EndCause.SILENT,
                f"the caller of session {self.id} has read nothing for {idle_s:g} s, so it has ended",
            )
        return None

    @property
    def is_writing(self) -> bool:
        """Whether an answer waits for the caller to read."""
        return self._writing_since_s is not None

    def is_too_long(self, now_s: float) -> bool:
        """Whether it has lasted longer than a session may."""
        longest_s = self._context.limits.session_s
        return longest_s is not None and self.failure is None and now_s - self._began_s > longest_s

    def is_unanswered(self, now_s: float) -> bool:
        """Whether Triton has owed it an answer for longer than it may."""
        since_s = self._waiting_since_s
        return since_s is not None and now_s - since_s > self._context.limits.answer_s

    def end_unanswered(self) -> None:
        """Ends the session because its answer does not come."""
        text = (
            f"the server has not answered a request of session {self.id} for {self._context.limits.answer_s:g} s; "
            "start a new session."
        )
        self.fail(PipeError(ErrorCode.FAILED, text))

    def end_too_long(self) -> None:
        """Ends the session because it has lasted as long as it may."""
        text = (
            f"session {self.id} has lasted {self._context.limits.session_s:g} s, the longest that this server allows; "
            "start a new session to go on."
        )
        self.fail(PipeError(ErrorCode.FAILED_PRECONDITION, text), EndCause.TOO_LONG)

    def fail(self, error: Exception, cause: EndCause = EndCause.FAILED) -> None:
        """Ends the session with an error, which answers everything that is under way and all further requests."""
        if self.failure is None:
            self.failure = self._text(error)
            if self._stream is not None:
                self._stream.answers.put_nowait(Closed(self.failure))
            self._finish(cause, self.failure)

    def lose(self, error: Exception) -> None:
        """Ends the session with an error because a stage has lost it; the other stages forget it by themselves."""
        self.fail(error)
        if self._stream is not None:
            self._stream.abandon()

    def drop(self, cause: EndCause, detail: str = "") -> None:
        """Ends the session without a word: its caller is gone, or silent. A caller that has sent END may go at once."""
        self.stop()
        self._has_ended, self._unanswered = True, 0
        self._all_answered.set()
        if self._context.window.inside(self.sequence):
            self._context.control.abandon(self.sequence)
        self._finish(self._end_asked or cause if cause is EndCause.DISCONNECTED else cause, detail)

    def stop(self) -> None:
        """Takes no more requests and gives no more answers."""
        for task in self._tasks:
            task.cancel()

    def _note_unanswered(self) -> None:
        self._used_s = time.monotonic()
        self._unanswered += 1
        self._all_answered.clear()

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except (grpc.RpcError, asyncio.InvalidStateError):
            pass  # the caller has gone; its stream ends the session
        except Exception as error:
            self._fail_unexpectedly(error)
            self._all_answered.set()

    def _fail_unexpectedly(self, error: Exception) -> None:
        """An error that nobody expected ends this session alone."""
        log.exception("session %d has failed in the gateway", self.sequence)
        self.fail(error)

    # Requests

    async def _forward(self) -> None:
        """Sends the session's requests to Triton, or expects an error in their place."""
        has_ended = await self._begin()
        while not has_ended:
            has_ended = await self._forward_next()

    async def _begin(self) -> bool:
        """Handles START; whether it is the end too."""
        start = await self._requests.get()
        assert isinstance(start, CallerRequest)
        try:
            expected = await self._open(start)
        except Exception as error:  # whatever it was, the caller is told, and nobody else is harmed
            expected = self._refuse_start(start, error)
        await self._expected.put(expected)
        return start.end

    async def _forward_next(self) -> bool:
        """Handles the next request; whether it is the last. Nothing of it is kept while the next one is awaited."""
        request = await self._requests.get()
        expected = request if isinstance(request, _Expected) else await self._send_or_fail(request)
        del request
        await self._expected.put(expected)
        return expected.end is not None

    async def _send_or_fail(self, request: CallerRequest) -> _Expected:
        try:
            return await self._send(request)
        except Exception as error:
            self._fail_unexpectedly(error)
            return _Expected.of(request, self.failure)

    async def _send(self, request: CallerRequest) -> _Expected:
        """Sends a request to Triton, at its turn, and says what answer is due: an error, if it cannot go there."""
        if self.failure is None:
            try:
                if request.is_block or not request.end:  # an end alone is served to the last
                    self._context.admission.check_continue()
            except ShutdownError as error:
                self.fail(error, EndCause.SHUTDOWN)
                return _Expected.of(request, self.failure)
            if request.is_block:
                await self._context.window.enter(self.sequence)
        if self.failure is not None:
            return _Expected.of(request, self._has_failed())
        return self._pass_on_block(request) if request.is_block else self._pass_on(request)

    def _pass_on(self, request: CallerRequest) -> _Expected:
        """Sends a request without speech to Triton."""
        self._post(triton_request(request, self.sequence), request.end)
        return _Expected.of(request)

    def _pass_on_block(self, request: CallerRequest, tensors: Iterable[tuple[str, str, Array]] = ()) -> _Expected:
        """Sends a block to Triton, and a request for each further answer behind it."""
        place = self._context.frames.take() if self._is_raw else None
        if place is not None:
            self._places.add(place)
        answers = self._answers_per_block
        for number in range(answers):
            part = replace(request, end=request.end and number == answers - 1)
            if number == 0:
                message = triton_request(part, self.sequence, tensors)
            else:
                message = triton_request(replace(part, audio=b""), self.sequence)
            if place is not None:
                ask_for_place(message, place.part(number, answers))
            self._post(message, part.end)
        return replace(_Expected.of(request), place=place, answers=answers)

    def _post(self, message: Message, is_end: bool) -> None:
        assert self._stream is not None
        self._stream.send(message)
        if is_end:
            self._end_sent = True
            self._stream.finish()

    def _misplaced(self, request: CallerRequest) -> str | None:
        """The error for a request that holds what belongs to the first one; it may be large, so it must not wait."""
        for name, value in (
            (protocol.REFERENCE_IMAGE.name, request.picture),
            (protocol.PROMPT.name, request.prompt),
            (protocol.SPEAKER_MASKS.name, request.masks),
        ):
            if value is not None and not request.start:
                return self._text(InputError(f"{name} came after the first request; start a new session to change it."))
        return None

    # Opening

    async def _open(self, start: CallerRequest) -> _Expected:
        """Admits the session, prepares its avatar, and sends START. Raises what the caller is to be told.

        A block that comes with START goes after it by itself: so a step makes its sink while the one before it works on
        the block, and blocks of other sessions go between the decoder's warm-up and this block.
        """
        context = self._context
        opening = await open_session(context, self._caller, start, self.sequence)
        self._record = opening.record
        self._is_raw = opening.options.frame_format is FrameFormat.RAW
        self._answers_per_block = FRAMES_PER_BLOCK // opening.options.frames_per_response
        context.window.join(self.sequence)
        context.live.add(self)
        self._stream = context.pipe.open()
        context.report()
        if not start.is_block:
            self._post(self._start_message(start, opening), start.end)
            return _Expected.of(start)
        self._post(self._start_message(replace(start, audio=b"", end=False), opening), is_end=False)
        await context.window.enter(self.sequence)
        if self.failure is not None:  # meanwhile; its end went to Triton, so nothing may follow
            return _Expected.of(start, self.failure)
        expected = self._pass_on_block(replace(start, start=False), opening.provenance)
        return replace(expected, start=True, before=1)

    def _start_message(self, start: CallerRequest, opening: Opening) -> Message:
        return triton_request(start, self.sequence, [*opening.tensors, *opening.provenance], with_options=True)

    def _refuse_start(self, start: CallerRequest, error: Exception) -> _Expected:
        text = self._text(error)
        note_refused(self._context, self._caller, self.sequence, error, text)
        self.failure = format_error(
            ErrorCode.FAILED_PRECONDITION, f"session {self.id} is not open: its start was refused; start a new session."
        )
        self._is_refused = True
        self._finish(EndCause.FAILED, text)
        return _Expected.of(start, text)

    # Answers

    async def _return(self) -> None:
        """Writes the answers to the caller, in the order of the requests."""
        while True:
            await self._return_next()

    async def _return_next(self) -> None:
        expected = await self._expected.get()
        for number in range(expected.answers):
            try:
                answer = await self._answer(expected, number)
            except Exception as error:
                self._fail_unexpectedly(error)
                answer = error_response(expected.request_id, self.failure or "")
            is_last = number == expected.answers - 1 or response_error(answer) is not None
            if is_last:
                await self._before_last(expected)
            self._writing_since_s = time.monotonic()
            await self._write(answer)
            self._writing_since_s = None
            if is_last:
                break
        self._note_answered(expected)

    async def _before_last(self, expected: _Expected) -> None:
        """What must be done before the caller has the last answer to a request."""
        if expected.text is None and expected.is_block and self._record is not None:
            self._record.blocks += 1
        if expected.end is not None:
            await self._free_place(expected.end)

    async def _answer(self, expected: _Expected, number: int) -> bytes:
        """The answer of that number, counted from 0, or an error."""
        text, before = expected.text, 0 if number else expected.before
        while text is None:
            assert self._stream is not None
            answer = self.failure if self.failure is not None else await self._next_answer(self._stream)
            if isinstance(answer, bytes):
                error = response_error(answer)
                if error is None and before:
                    before -= 1
                    continue
                if error is None:
                    return self._with_frames(answer, expected, number)
                told = self._told(error)
                if expected.start and told.code is ErrorCode.UNAVAILABLE:
                    self._context.meter.add(metrics.SESSIONS_REFUSED, reason=RefusalReason.MEMORY)
                self.fail(told)
            elif isinstance(answer, Closed) and self.failure is None:
                self.fail(PipeError(ErrorCode.FAILED, f"{answer.reason}; start a new session."))
            text = self.failure or ""
        return error_response(expected.request_id, text)

    async def _next_answer(self, stream: PipeStream) -> bytes | Closed:
        self._waiting_since_s = time.monotonic()
        try:
            return await stream.answers.get()
        finally:
            self._waiting_since_s = None

    def _with_frames(self, answer: bytes, expected: _Expected, number: int) -> bytes:
        place, answers = expected.place, expected.answers
        if place is None:
            return answer
        whole = self._context.frames.answer(answer, place.part(number, answers))
        if number == answers - 1:
            self._places.discard(place)
            self._context.frames.give_back(place)
        return whole

    def _note_answered(self, expected: _Expected) -> None:
        self._used_s = time.monotonic()
        if expected.text is None and expected.is_block:
            self._context.window.exit(self.sequence)
        self._has_ended |= expected.end is not None or (expected.start and self._is_refused)
        self._unanswered -= 1
        if self._unanswered == 0:
            self._all_answered.set()

    def _told(self, error: str) -> PipeError:
        """An error of Triton as the caller is told it, which knows its own session id only."""
        code, sentence = parse_error(error)
        sentence = explain_error(sentence).replace(f"session {self.sequence}", f"session {self.id}")
        return PipeError(code or ErrorCode.FAILED, sentence)

    def _text(self, error: Exception) -> str:
        failure = describe(error, GATEWAY, NO_BLOCK)
        return format_error(failure.code, str(failure))

    def _has_failed(self) -> str:
        if self._is_refused and self.failure is not None:
            return self.failure
        _, reason = parse_error(self.failure or "")
        return format_error(
            ErrorCode.FAILED_PRECONDITION, f"session {self.id} has failed ({reason}); end it and start a new one."
        )

    # The end

    def _finish(self, cause: EndCause, detail: str = "") -> None:
        """Ends the session in the pipe, once; its place is free when Triton has answered everything."""
        if self._record is None or self not in self._context.live:
            return
        self._context.live.discard(self)
        self._context.meter.add(metrics.SESSIONS_ENDED, reason=cause)
        self._context.audit.ended(self._record, cause, detail)
        self._closing = asyncio.create_task(self._close_pipe())
        self._context.closing[self._closing] = self
        self._closing.add_done_callback(self._context.closing.pop)

    async def _free_place(self, cause: EndCause) -> None:
        """Ends the session, and returns when its place is free: its caller may open the next one after this answer."""
        self._finish(cause)
        if self._closing is not None and self.failure is None:
            await asyncio.wait([self._closing], timeout=PLACE_LIMIT_S)

    async def _close_pipe(self) -> None:
        context = self._context
        try:
            if self._stream is not None:
                if not self._end_sent:
                    self._stream.send(end_request(self.sequence))
                    self._stream.finish()
                self._stream.on_closed(self._give_places_back)  # until then Triton may write into them
                await asyncio.wait_for(self._stream.wait_closed(), CLOSE_LIMIT_S)
        except TimeoutError:
            log.error("session %d did not end in the pipe within %g s", self.sequence, CLOSE_LIMIT_S)
        finally:
            context.control.forget_abandoned(self.sequence)
            context.window.leave(self.sequence)
            context.admission.close(self._caller.name)
            context.report()

    def _give_places_back(self) -> None:
        while self._places:
            self._context.frames.give_back(self._places.pop())


def _requested_cause(request: CallerRequest) -> EndCause:
    """The cause of an end that the caller asked for."""
    reason = str(request.parameters.get(protocol.END_REASON_PARAMETER, ""))
    return EndCause(reason) if reason in tuple(EndReason) else EndCause.ENDED
