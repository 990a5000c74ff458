"""The table of a stage's live sessions, with the idle limit."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from live_avatar.errors import SessionError

T = TypeVar("T")


@dataclass(frozen=True)
class SessionLimits:
    """Limits of a stage: seconds after which an idle session is dropped, and avatars whose work is kept."""

    idle_s: float
    known_avatars: int


@dataclass
class _Entry(Generic[T]):
    state: T | None
    last_used_s: float
    failure: str | None = None


class SessionTable(Generic[T]):
    """States of the live sessions of one stage.

    A state is dropped when its session ends, fails, or is idle for `idle_limit_s`. The table needs its own clock,
    because Triton frees an idle sequence without telling the model. A failed session is remembered until its end,
    because Triton still delivers the blocks that are under way.
    """

    def __init__(self, idle_limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._entries: dict[int, _Entry[T]] = {}
        self._idle_limit_s = idle_limit_s
        self._clock = clock

    def __len__(self) -> int:
        """Number of live sessions; failed ones do not count."""
        return sum(entry.failure is None for entry in self._entries.values())

    def __contains__(self, session: int) -> bool:
        """Whether a session is live."""
        return session in self._entries and self._entries[session].failure is None

    def open(self, session: int, make: Callable[[], T]) -> T:
        """Adds a session."""
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
        """State of a live session; does not reset its idle time."""
        entry = self._entries.get(session)
        return None if entry is None else entry.state

    def has_failed(self, session: int) -> bool:
        """Whether a session has failed and has not ended yet."""
        entry = self._entries.get(session)
        return entry is not None and entry.failure is not None

    def fail(self, session: int, reason: str) -> None:
        """Drops a session's state and marks it as failed; its further blocks are refused."""
        if session not in self._entries or session in self:  # the first reason stays
            self._entries[session] = _Entry(None, self._clock(), reason)

    def close(self, session: int) -> T | None:
        """Removes a session; returns its state if it was live."""
        entry = self._entries.pop(session, None)
        return None if entry is None else entry.state

    def sweep(self, keep: int | None = None) -> list[tuple[int, T]]:
        """Drops the sessions that were idle for too long; returns those that were live."""
        limit = self._clock() - self._idle_limit_s
        idle = [s for s, entry in self._entries.items() if entry.last_used_s < limit and s != keep]
        dropped = [(session, self.close(session)) for session in idle]
        return [(session, state) for session, state in dropped if state is not None]

    def clear(self) -> list[tuple[int, T]]:
        """Drops all sessions; returns those that were live."""
        live = [(session, entry.state) for session, entry in self._entries.items() if entry.state is not None]
        self._entries.clear()
        return live

    def extend_idle(self, seconds: float) -> None:
        """Extends the idle limit of every session once by `seconds`."""
        for entry in self._entries.values():
            entry.last_used_s += seconds
