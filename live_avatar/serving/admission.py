"""Admission of sessions: who may start and go on, and the counts of sessions that were admitted, refused and ended."""

from __future__ import annotations

import logging
from dataclasses import asdict

from live_avatar.errors import CapacityError, InputError, ShutdownError
from live_avatar.serving import metrics
from live_avatar.serving.control import Control, Phase
from live_avatar.serving.failures import PipeError
from live_avatar.serving.metrics import EndCause, Meter, RefusalReason
from live_avatar.serving.status import Served
from live_avatar_client.protocol import ErrorCode

log = logging.getLogger(__name__)

STAGE = "conditioning"


class AdmissionController:
    """Admits sessions for the first stage, and reports their numbers."""

    def __init__(self, served: Served, control: Control, meter: Meter) -> None:
        self.served = served
        self.meter = meter
        self._control = control
        self._declare_metrics()

    @property
    def phase(self) -> Phase:
        return self._control.phase

    def check_start(self, live: int) -> None:
        """Raises `ShutdownError` if the server takes no new sessions. live: sessions without the new one."""
        # Before the phase is read, so that a drain waits for a session that is about to start.
        self._control.set_live_sessions(STAGE, live + 1)
        if self.phase is not Phase.SERVING:
            raise ShutdownError(
                "this server is shutting down and takes no new sessions; connect again to reach another one."
            )

    def check_continue(self, is_bare_end: bool) -> None:
        """Raises `ShutdownError` if the server ends its live sessions; an end without speech is still served."""
        if self.phase is Phase.CLOSING and not is_bare_end:
            raise ShutdownError("this server is shutting down; reconnect, and start a new session to go on.")

    def admit(self) -> None:
        """Counts a session that was opened."""
        self.meter.add(metrics.SESSIONS_ADMITTED)

    def refuse(self, session: int, error: Exception, failure: PipeError) -> None:
        """Counts a session that was not opened, unless the server failed."""
        reason = _refusal_reason(error, failure.code)
        if reason is not None:
            self.meter.add(metrics.SESSIONS_REFUSED, reason=reason)
            log.info("session %d refused: %s", session, reason)

    def end(self, cause: EndCause) -> None:
        """Counts a session that has ended."""
        self.meter.add(metrics.SESSIONS_ENDED, reason=cause)

    def report(self, live: int) -> None:
        """Sets the gauges, and tells the supervisor how many sessions are live."""
        free = self.served.max_sessions - live if self.phase is Phase.SERVING else 0
        self.meter.set(metrics.SESSIONS_LIVE, live)
        self.meter.set(metrics.SESSIONS_FREE, free)
        self._control.set_live_sessions(STAGE, live)

    def _declare_metrics(self) -> None:
        """Creates every series, so that it reads 0 before its first event."""
        info = asdict(self.served)
        self.meter.set(metrics.SESSIONS_LIMIT, info.pop("max_sessions"))
        self.meter.set(metrics.INFO, 1, **info)
        self.meter.declare(metrics.SESSIONS_ADMITTED)
        for refusal in RefusalReason:
            self.meter.declare(metrics.SESSIONS_REFUSED, reason=refusal)
        for cause in EndCause:
            self.meter.declare(metrics.SESSIONS_ENDED, reason=cause)
        lost = self._control.live_in(STAGE)  # with the previous process of this stage
        self.meter.add(metrics.SESSIONS_ENDED, lost, reason=EndCause.FAILED)
        self.report(live=0)


def _refusal_reason(error: Exception, code: ErrorCode) -> RefusalReason | None:
    match error:
        case ShutdownError():
            return RefusalReason.SHUTDOWN
        case CapacityError():
            return RefusalReason.FULL
        case InputError():
            return RefusalReason.INPUT
    return RefusalReason.MEMORY if code is ErrorCode.UNAVAILABLE else None
