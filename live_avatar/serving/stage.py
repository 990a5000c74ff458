"""What every served stage has in common: requests in plain arrays, session states, failures, and ends.

A session that fails in one stage must end in all of them, so a failure travels down the pipe like a block does, and the
last stage hands it to the client (`PipeStage`). Knows sessions, clocks and block numbers; knows no Triton API and no
network.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from live_avatar.arrays import Array, Arrays
from live_avatar.errors import CapacityError, InputError, LiveAvatarError, SessionError
from live_avatar.serving.metrics import FAILURES, SESSIONS_REFUSED, EndCause, Meter, RefusalReason
from live_avatar.serving.tensors import BLOCK, FAILURE, read_text, text_tensor
from live_avatar_client.protocol import END_REASON_PARAMETER, EndReason, ErrorCode, format_error, parse_error

log = logging.getLogger(__name__)

NO_BLOCK = -1
"""Block number of a request that carries no speech: keep-alive, or the end by itself."""
LONG_S = 1.0
"""A request that takes longer keeps others waiting for so long that their silence is not theirs. Where most requests
take longer, silent sessions are dropped later than the idle limit says."""

T = TypeVar("T")


@dataclass(frozen=True)
class StageRequest:
    """One request of one session. inputs: arrays by tensor name, BYTES as object arrays."""

    session: int
    start: bool
    end: bool
    inputs: Arrays
    parameters: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class StageResponse:
    """Outputs by tensor name, the block they belong to, and the time that the stage spent waiting, which is not busy time.

    after_response: work that runs after the outputs were sent and before the stage's next request. The client does not
    see its errors, so an error must leave the stage in a valid state.
    """

    outputs: dict[str, Array]
    block: int = NO_BLOCK
    waited_s: float = 0.0
    after_response: Callable[[], object] | None = None


class Stage(Protocol):
    def handle(self, request: StageRequest) -> StageResponse:
        """Answers one request. Raises a `LiveAvatarError` whose sentence goes to the client."""
        ...

    def sweep(self, keep: int | None = None) -> None:
        """Drops the sessions that were silent for too long, but for `keep`."""
        ...

    def extend_idle(self, seconds: float) -> None:
        """Does not count that time, in which the stage could hear no one, as silence."""
        ...

    def drop_all(self) -> None:
        """Drops all sessions: another stage's process died, and what it knew of them with it."""
        ...


class PipeError(LiveAvatarError):
    """A failure that came down the pipe: its code, and the sentence for the client."""

    def __init__(self, code: ErrorCode, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


@dataclass
class _Entry(Generic[T]):
    state: T | None
    last_used_s: float
    failure: str | None = None


class SessionTable(Generic[T]):
    """States of the live sessions of one stage.

    A state is dropped when its session ends or fails, and by this table's own clock after `idle_limit_s`, because
    Triton frees an idle sequence's slot without telling the model. That a session failed is remembered
    until its end, since Triton still delivers the blocks that are under way.
    """

    def __init__(
        self, idle_limit_s: float, limit: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._entries: dict[int, _Entry[T]] = {}
        self._idle_limit_s = idle_limit_s
        self._limit = limit
        self._clock = clock

    def __len__(self) -> int:
        """How many sessions are live; those that have failed are not."""
        return sum(entry.failure is None for entry in self._entries.values())

    def __contains__(self, session: int) -> bool:
        """Whether a session is live."""
        return session in self._entries and self._entries[session].failure is None

    def open(self, session: int, make: Callable[[], T]) -> T:
        """Adds a session. Raises `CapacityError` at the limit, before `make` is called."""
        if self._limit is not None and session not in self and len(self) >= self._limit:
            raise CapacityError(f"all {self._limit} sessions of this server are taken; try again later or elsewhere.")
        state = make()
        self._entries[session] = _Entry(state, self._clock())
        return state

    def get(self, session: int) -> T:
        """State of a live session. Raises `SessionError` for one that is unknown or has failed."""
        entry = self._entries.get(session)
        if entry is not None and entry.failure is not None:
            raise SessionError(f"session {session} has failed ({entry.failure}); end it and start a new one.")
        if entry is None or entry.state is None:
            raise SessionError(
                f"session {session} is not open here: it was never started, has ended, was lost with a stage that had "
                f"to be loaded again, or was silent for more than {self._idle_limit_s:g} s; start a new session."
            )
        entry.last_used_s = self._clock()
        return entry.state

    def peek(self, session: int) -> T | None:
        """State of a live session, without taking it for a sign of life."""
        entry = self._entries.get(session)
        return None if entry is None else entry.state

    def has_failed(self, session: int) -> bool:
        """Whether a session has failed and was not ended since."""
        entry = self._entries.get(session)
        return entry is not None and entry.failure is not None

    def fail(self, session: int, reason: str) -> None:
        """Drops a session's state and remembers that it has failed; its further blocks are refused."""
        if session not in self._entries or session in self:  # the first reason stays
            self._entries[session] = _Entry(None, self._clock(), reason)

    def close(self, session: int) -> T | None:
        """Forgets a session; returns its state if it was live."""
        entry = self._entries.pop(session, None)
        return None if entry is None else entry.state

    def sweep(self, keep: int | None = None) -> list[tuple[int, T]]:
        """Drops the sessions that were silent for too long; returns those of them that were live."""
        limit = self._clock() - self._idle_limit_s
        silent = [s for s, entry in self._entries.items() if entry.last_used_s < limit and s != keep]
        dropped = [(session, self.close(session)) for session in silent]
        return [(session, state) for session, state in dropped if state is not None]

    def clear(self) -> list[tuple[int, T]]:
        """Drops all sessions; returns those that were live."""
        live = [(session, entry.state) for session, entry in self._entries.items() if entry.state is not None]
        self._entries.clear()
        return live

    def extend_idle(self, seconds: float) -> None:
        """Moves what is known of everyone's silence forward."""
        for entry in self._entries.values():
            entry.last_used_s += seconds


class SessionStage(Generic[T]):
    """A stage that keeps a state per session."""

    def __init__(self, name: str, meter: Meter, sessions: SessionTable[T]) -> None:
        self.name = name
        self.meter = meter
        self.sessions = sessions
        meter.declare(FAILURES)

    def sweep(self, keep: int | None = None) -> None:
        for session, state in self.sessions.sweep(keep):
            self.on_idle(session, state)

    def extend_idle(self, seconds: float) -> None:
        if seconds > LONG_S:
            self.sessions.extend_idle(seconds)

    def drop_all(self) -> None:
        for session, state in self.sessions.clear():
            self.on_reset(session, state)

    def on_idle(self, session: int, state: T) -> None:
        """Told of each session that was dropped for its silence."""

    def on_reset(self, session: int, state: T) -> None:
        """Told of each session that was dropped because a stage was loaded again."""

    def failed(self, error: Exception, block: int) -> PipeError:
        """Puts what went wrong here into words that name the stage and block; counts it if the fault is ours."""
        failure = describe(error, self.name, block)
        if failure.code is ErrorCode.FAILED or is_out_of_memory(error):
            log.error("%s", failure, exc_info=error)
            self.meter.add(FAILURES)
        return failure


class PipeStage(SessionStage[T]):
    """A stage behind conditioning: works on a session's blocks, and passes on what failed before it or in it."""

    def work(self, request: StageRequest, block: int) -> StageResponse:
        """Answers a request of a session that is well; what it raises ends the session."""
        raise NotImplementedError

    def forward_failure(self, request: StageRequest, failure: PipeError) -> StageResponse:
        """The answer that takes a failure on to the next stage."""
        raise NotImplementedError

    def on_local_failure(self, request: StageRequest) -> None:
        """Told when a session has failed in this very stage."""

    def on_failed(self, session: int, state: T, failure: PipeError) -> None:
        """Told of each live session that a failure ended, in this stage or before it."""

    def handle(self, request: StageRequest) -> StageResponse:
        failure = read_failure(request.inputs)
        try:
            if failure is None:
                return self._work(request, int(request.inputs[BLOCK][0]))
            self._drop(request.session, failure)
            return self.forward_failure(request, failure)
        finally:
            if request.end:
                self.sessions.close(request.session)

    def _work(self, request: StageRequest, block: int) -> StageResponse:
        try:
            return self.work(request, block)
        except Exception as error:
            failure = self.failed(error, block)
            if request.start and failure.code is ErrorCode.UNAVAILABLE:
                self.meter.add(SESSIONS_REFUSED, reason=RefusalReason.MEMORY)
            if request.start or request.session in self.sessions:
                self._drop(request.session, failure)
                self.sessions.fail(request.session, str(failure))
                self.on_local_failure(request)
            return self.forward_failure(request, failure)

    def _drop(self, session: int, failure: PipeError) -> None:
        state = self.sessions.close(session)
        if state is not None:
            self.on_failed(session, state, failure)


def end_cause(request: StageRequest) -> EndCause:
    """Why a session ends that its client ends."""
    reason = str(request.parameters.get(END_REASON_PARAMETER, ""))
    return EndCause(reason) if reason in tuple(EndReason) else EndCause.ENDED


def describe(error: Exception, stage: str, block: int) -> PipeError:
    """What went wrong in a stage, as the client is told."""
    where = f"stage {stage} at block {block + 1}" if block != NO_BLOCK else f"stage {stage}"
    match error:
        case PipeError():
            return error
        case InputError():
            return PipeError(ErrorCode.INVALID_ARGUMENT, str(error))
        case CapacityError():
            return PipeError(ErrorCode.UNAVAILABLE, str(error))
        case SessionError():
            return PipeError(ErrorCode.FAILED_PRECONDITION, str(error))
    if is_out_of_memory(error):
        return PipeError(
            ErrorCode.UNAVAILABLE,
            f"{where} has no memory left ({str(error)[:200]}); try again later or elsewhere.",
        )
    return PipeError(
        ErrorCode.FAILED, f"{where} failed ({type(error).__name__}: {error}); end the session and start a new one."
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of the host or (in torch's words, not imported here) of a GPU."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def failure_tensor(failure: PipeError | None) -> Array:
    """FAILURE, empty when all is well."""
    return text_tensor("" if failure is None else format_error(failure.code, str(failure)))


def read_failure(inputs: Arrays) -> PipeError | None:
    """The failure that a request brings along, if any."""
    if not len(inputs[FAILURE]):
        return None
    code, sentence = parse_error(read_text(inputs[FAILURE]))
    return PipeError(code or ErrorCode.FAILED, sentence)


def expect_block(session: int, block: int, expected: int) -> None:
    """Raises `SessionError` unless a session's blocks arrive without a gap."""
    if block != expected:
        raise SessionError(
            f"session {session} brings block {block + 1} where block {expected + 1} was due, because an earlier block "
            "failed; end it and start a new one."
        )
