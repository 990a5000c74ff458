"""Who may open a session: the limits in all and of each caller, and the phases of a server that shuts down."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from enum import StrEnum

from live_avatar.errors import CapacityError, ShutdownError
from live_avatar.serving.gateway_settings import Limits

MINUTE_S = 60.0


class Phase(StrEnum):
    SERVING = "serving"
    DRAINING = "draining"
    """No new sessions; the live ones go on."""
    CLOSING = "closing"
    """The live ones end with their next request."""


class Admission:
    """Counts the live sessions of all callers."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.phase = Phase.SERVING
        self.is_pipe_ready = False
        """Whether all stages are there, also while the server drains."""
        self._limits = limits
        self._clock = clock
        self._live: Counter[str] = Counter()
        self._starts: dict[str, deque[float]] = {}

    @property
    def live(self) -> int:
        return self._live.total()

    @property
    def free(self) -> int:
        """Sessions that could be opened now."""
        return max(self._limits.max_sessions - self.live, 0) if self.is_ready else 0

    @property
    def is_ready(self) -> bool:
        return self.phase is Phase.SERVING and self.is_pipe_ready

    def check_phase(self) -> None:
        """Raises `ShutdownError` if no new sessions are taken, `CapacityError` while a stage is being started."""
        if self.phase is not Phase.SERVING:
            raise ShutdownError(
                "this server is shutting down and takes no new sessions; connect again to reach another one."
            )
        self._check_pipe()

    def check_admitted(self) -> None:
        """Raises the same for a session that has its place and was not started yet; a drain lets it go on."""
        self.check_continue()
        self._check_pipe()

    def check_continue(self) -> None:
        """Raises `ShutdownError` if the live sessions end now."""
        if self.phase is Phase.CLOSING:
            raise ShutdownError("this server is shutting down; reconnect, and start a new session to go on.")

    def open(self, caller: str) -> None:
        """Takes a place for a session. Raises `CapacityError` at a limit; `close` gives the place back."""
        limits, own = self._limits, self._live[caller]
        if self.live >= limits.max_sessions:
            raise CapacityError(
                f"all {limits.max_sessions} sessions of this server are taken; try again later or elsewhere."
            )
        if limits.sessions_per_key is not None and own >= limits.sessions_per_key:
            raise CapacityError(
                f"all {limits.sessions_per_key} sessions of key {caller} are taken; end one of them or try again later."
            )
        self._count_start(caller)
        self._live[caller] += 1

    def close(self, caller: str) -> None:
        self._live[caller] -= 1
        if self._live[caller] <= 0:
            del self._live[caller]

    def _check_pipe(self) -> None:
        if not self.is_pipe_ready:
            raise CapacityError("a stage of this server is being started; try again later or elsewhere.")

    def _count_start(self, caller: str) -> None:
        most, now_s = self._limits.starts_per_minute, self._clock()
        if most is None:
            return
        self._starts = {name: starts for name, starts in self._starts.items() if starts[-1] > now_s - MINUTE_S}
        starts = self._starts.setdefault(caller, deque(maxlen=most))
        if len(starts) == most and starts[0] > now_s - MINUTE_S:
            raise CapacityError(
                f"key {caller} has started {most} sessions within a minute, the most that it may; try again in "
                f"{starts[0] + MINUTE_S - now_s:.0f} s."
            )
        starts.append(now_s)
