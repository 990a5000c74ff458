"""What every served stage has in common: requests in plain arrays, session states, and their ends.

Knows sessions, clocks and block numbers; knows no Triton API and no network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from live_avatar.arrays import Array, Arrays
from live_avatar.errors import CapacityError, SessionError

NO_BLOCK = -1
"""Block number of a request that carries no speech: keep-alive, or the end by itself."""

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
    """Outputs by tensor name; the block they belong to, and how long the stage waited at the end (not busy)."""

    outputs: dict[str, Array]
    block: int = NO_BLOCK
    waited_s: float = 0.0


class Stage(Protocol):
    def handle(self, request: StageRequest) -> StageResponse:
        """Answers one request. Raises a `LiveAvatarError` whose sentence goes to the client."""
        ...


@dataclass
class _Entry(Generic[T]):
    state: T
    last_used_s: float
    failure: str | None = None


class SessionTable(Generic[T]):
    """States of the live sessions of one stage.

    A state is dropped when its session ends, and by this table's own clock after `idle_limit_s`, because
    Triton frees an idle sequence's slot without telling the model. A session that failed is remembered
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
        return len(self._entries)

    def __contains__(self, session: int) -> bool:
        return session in self._entries

    def open(self, session: int, make: Callable[[], T]) -> T:
        """Adds a session. Raises `CapacityError` at the limit, before `make` is called."""
        self.sweep()
        if self._limit is not None and session not in self._entries and len(self._entries) >= self._limit:
            raise CapacityError(f"all {self._limit} sessions of this server are taken; try again later or elsewhere.")
        state = make()
        self._entries[session] = _Entry(state, self._clock())
        return state

    def get(self, session: int) -> T:
        """State of a live session. Raises `SessionError` for one that is unknown or has failed."""
        self.sweep(keep=session)
        entry = self._entries.get(session)
        if entry is None:
            raise SessionError(
                f"session {session} is not open here: it was never started, has ended, or was silent for more than "
                f"{self._idle_limit_s:g} s; start a new session."
            )
        if entry.failure is not None:
            raise SessionError(f"session {session} has failed ({entry.failure}); end it and start a new one.")
        entry.last_used_s = self._clock()
        return entry.state

    def fail(self, session: int, reason: str) -> None:
        """Remembers that a session has failed; its further blocks are refused."""
        if session in self._entries and self._entries[session].failure is None:
            self._entries[session].failure = reason

    def close(self, session: int) -> None:
        self._entries.pop(session, None)

    def sweep(self, keep: int | None = None) -> None:
        """Drops the sessions that were silent for too long."""
        limit = self._clock() - self._idle_limit_s
        for session in [s for s, e in self._entries.items() if e.last_used_s < limit and s != keep]:
            del self._entries[session]


def expect_block(session: int, block: int, expected: int) -> None:
    """Raises `SessionError` unless a session's blocks arrive without a gap."""
    if block != expected:
        raise SessionError(
            f"session {session} brings block {block + 1} where block {expected + 1} was due, because an earlier block "
            "failed; end it and start a new one."
        )
