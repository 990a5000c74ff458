"""Which session's block enters the pipe next, so that a session that sends far ahead costs its neighbours little.

A block occupies the pipe from its entry until its frames are with the caller. A session that speaks in real time enters
at once. A session that is ahead of its own playback shares the pipe with the other live sessions in equal parts; alone
it may fill the pipe.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Final

from live_avatar.serving.gateway_settings import Limits
from live_avatar_client.protocol import FPS, FRAMES_PER_BLOCK

BLOCK_S: Final = FRAMES_PER_BLOCK / FPS
AHEAD_BLOCKS: Final = 2
"""A session in real time may be ahead of its playback by fewer blocks than this, because chunks come in bursts."""


@dataclass
class _Member:
    played_s: float
    """When the playback of all blocks that were let in ends. Time in which nothing was sent is no credit."""
    waiting: deque[asyncio.Future[None]] = field(default_factory=deque)


class PipeWindow:
    """The places in the pipe, and the sessions that share them."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._members: dict[Hashable, _Member] = {}
        self._inside: Counter[Hashable] = Counter()
        self._order: deque[Hashable] = deque()

    def join(self, session: Hashable) -> None:
        """Counts a session as live."""
        self._members[session] = _Member(self._clock())

    def leave(self, session: Hashable) -> None:
        """The session has ended: its places are free, and nothing of it waits any longer."""
        member = self._members.pop(session, None)
        self._inside.pop(session, None)
        if member is not None:
            for waiter in member.waiting:
                if not waiter.done():
                    waiter.set_result(None)
        self._admit()

    async def enter(self, session: Hashable) -> None:
        """Returns when the session's next block may enter. One call at a time for each session."""
        member = self._members[session]
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        member.waiting.append(waiter)
        if session not in self._order:
            self._order.append(session)
        self._admit()
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.exit(session)
            raise

    def exit(self, session: Hashable) -> None:
        """A block of the session has left the pipe."""
        if self._inside[session] > 0:
            self._inside[session] -= 1
        self._admit()

    def inside(self, session: Hashable | None = None) -> int:
        """Blocks in the pipe, of one session or of all."""
        return self._inside.total() if session is None else self._inside[session]

    def _admit(self) -> None:
        """Lets in all that may enter now: sessions in real time first, then the others in turn."""
        for is_ahead in (False, True):
            for _ in range(len(self._order)):
                session = self._order.popleft()
                member = self._members.get(session)
                if member is None or not member.waiting:
                    continue
                if self._is_ahead(member) is is_ahead and self._has_place(session, member):
                    self._let_in(session, member)
                if member.waiting:
                    self._order.append(session)

    def _let_in(self, session: Hashable, member: _Member) -> None:
        waiter = member.waiting.popleft()
        if not waiter.done():
            member.played_s = max(member.played_s, self._clock()) + BLOCK_S
            self._inside[session] += 1
            waiter.set_result(None)

    def _has_place(self, session: Hashable, member: _Member) -> bool:
        inside = self._inside[session]
        if len(self._members) == 1 or not self._is_ahead(member):
            return inside < self._limits.lone_blocks
        share = max(1, self._limits.pipe_blocks // len(self._members))
        return inside < share and self.inside() < max(self._limits.pipe_blocks, len(self._members))

    def _is_ahead(self, member: _Member) -> bool:
        return member.played_s - self._clock() > (AHEAD_BLOCKS - 0.5) * BLOCK_S  # half a block for rounding
