"""Parts that all served stages share: requests and responses in plain arrays, and the handling of failures.

A session that fails in one stage must end in all of them, so a failure travels down the pipe like a block, and the last
stage sends it to the client (`PipeStage`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from live_avatar.arrays import Array, Arrays
from live_avatar.errors import SessionError
from live_avatar.serving.failures import PipeError, describe, is_out_of_memory, read_failure
from live_avatar.serving.metrics import FAILURES, Meter
from live_avatar.serving.sessions import SessionTable
from live_avatar.serving.tensors import BLOCK, NO_BLOCK
from live_avatar_client.protocol import ErrorCode

log = logging.getLogger(__name__)

LONG_S = 1.0
"""A request that takes longer than this extends the idle limit of all sessions, whose requests wait behind it. Where
most requests take longer, idle sessions are dropped later than the idle limit."""

T = TypeVar("T")


@dataclass(frozen=True)
class StageRequest:
    """One request of one session. inputs: arrays by tensor name, BYTES as object arrays. abandoned: nobody waits for
    the answer, so the session is to end without work."""

    session: int
    start: bool
    end: bool
    inputs: Arrays
    parameters: Mapping[str, object] = field(default_factory=dict)
    abandoned: bool = False

    def expect_caller(self) -> None:
        """Raises `SessionError` if the session is abandoned."""
        if self.abandoned:
            raise SessionError(f"the caller of session {self.session} is gone; start a new session.")


@dataclass(frozen=True)
class StageResponse:
    """Outputs by tensor name, the block they belong to, and the time that the stage waited (not busy).

    is_last: whether the stage has nothing left to do for the block.
    after_response: work that runs after the outputs were sent and before the stage's next request. The client does not
    see its errors, so an error must leave the stage in a valid state.
    """

    outputs: dict[str, Array]
    block: int = NO_BLOCK
    waited_s: float = 0.0
    after_response: Callable[[], object] | None = None
    is_last: bool = True


class Stage(Protocol):
    def handle(self, request: StageRequest) -> StageResponse:
        """Answers one request. Raises a `LiveAvatarError` whose sentence goes to the client."""
        ...

    def sweep(self, keep: int | None = None) -> None:
        """Drops the sessions that were idle for too long, except `keep`."""
        ...

    def extend_idle(self, seconds: float) -> None:
        """Does not count `seconds`, in which the stage took no requests, as idle time."""
        ...

    def drop_all(self) -> None:
        """Drops all sessions, because another stage's process died with its part of their state."""
        ...


class StatelessStage:
    """A stage that keeps no sessions."""

    def __init__(self, name: str, meter: Meter) -> None:
        self.name = name
        self.meter = meter
        meter.declare(FAILURES)

    def work(self, request: StageRequest) -> StageResponse:
        """Answers a request."""
        raise NotImplementedError

    def handle(self, request: StageRequest) -> StageResponse:
        try:
            return self.work(request)
        except Exception as error:
            report_failure(error, self.name, NO_BLOCK, self.meter)
            raise

    def sweep(self, keep: int | None = None) -> None:
        """Does nothing: there are no sessions."""

    def extend_idle(self, seconds: float) -> None:
        """Does nothing: there are no sessions."""

    def drop_all(self) -> None:
        """Does nothing: there are no sessions."""


class SessionStage(Generic[T]):
    """A stage that keeps a state per session."""

    def __init__(self, name: str, meter: Meter, sessions: SessionTable[T]) -> None:
        self.name = name
        self.meter = meter
        self.sessions = sessions
        meter.declare(FAILURES)

    def sweep(self, keep: int | None = None) -> None:
        self.sessions.sweep(keep)

    def extend_idle(self, seconds: float) -> None:
        if seconds > LONG_S:
            self.sessions.extend_idle(seconds)

    def drop_all(self) -> None:
        self.sessions.clear()

    def failed(self, error: Exception, block: int) -> PipeError:
        """The failure for an error in this stage; logs and counts it if the server caused it."""
        return report_failure(error, self.name, block, self.meter)


class PipeStage(SessionStage[T]):
    """A stage after conditioning: processes the blocks of its sessions, and forwards failures to the next stage."""

    def work(self, request: StageRequest, block: int) -> StageResponse:
        """Answers a request of a session that has not failed. An error ends the session."""
        raise NotImplementedError

    def forward_failure(self, request: StageRequest, failure: PipeError) -> StageResponse:
        """The answer that carries a failure to the next stage."""
        raise NotImplementedError

    def on_local_failure(self, request: StageRequest) -> None:
        """Called when a session has failed in this stage."""

    def handle(self, request: StageRequest) -> StageResponse:
        failure = read_failure(request.inputs)
        try:
            if failure is None:
                return self._work(request, int(request.inputs[BLOCK][0]))
            self.sessions.close(request.session)
            return self.forward_failure(request, failure)
        finally:
            if request.end:
                self.sessions.close(request.session)

    def _work(self, request: StageRequest, block: int) -> StageResponse:
        try:
            request.expect_caller()
            return self.work(request, block)
        except Exception as error:
            failure = self.failed(error, block)
            if request.start or request.session in self.sessions:
                self.sessions.fail(request.session, str(failure))
                self.on_local_failure(request)
            return self.forward_failure(request, failure)


def report_failure(error: Exception, stage: str, block: int, meter: Meter) -> PipeError:
    """The failure for an error in a stage; logs and counts it if the server caused it."""
    failure = describe(error, stage, block)
    if failure.code is ErrorCode.FAILED or is_out_of_memory(error):
        log.error("%s", failure, exc_info=error)
        meter.add(FAILURES)
    return failure


def expect_block(session: int, block: int, expected: int) -> None:
    """Raises `SessionError` unless a session's blocks arrive without a gap."""
    if block != expected:
        raise SessionError(
            f"session {session} brings block {block + 1} where block {expected + 1} was due, because an earlier block "
            "failed; end it and start a new one."
        )
