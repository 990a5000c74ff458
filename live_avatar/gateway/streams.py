"""A caller's stream: it may carry several sessions, and its sessions end with it."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import Final

from live_avatar.errors import InputError, LiveAvatarError, SessionError
from live_avatar.gateway.context import Caller, SessionContext
from live_avatar.gateway.requests import (
    MAX_REQUEST_ID_CHARS,
    CallerRequest,
    Message,
    error_response,
    read_request,
    sequence_of,
)
from live_avatar.gateway.sessions import GATEWAY, Session, Write
from live_avatar.serving import metrics
from live_avatar.serving.failures import describe
from live_avatar.serving.metrics import EndCause, RefusalReason
from live_avatar.serving.tensors import NO_BLOCK
from live_avatar_client.protocol import format_error

REMEMBERED_ENDS: Final = 64
"""Sessions that ended without END whose reason a stream remembers, for a later request."""
EMPTY_BY_IDLE: Final = 2.0
"""A stream ends when it has had no session for this many times the idle limit of sessions."""
MAX_SESSIONS: Final = 256
"""Sessions of one stream, failed ones included."""


class CallerStream:
    """Serves the requests of one stream until the caller closes it."""

    def __init__(self, caller: Caller, context: SessionContext, write: Write) -> None:
        self.caller = self._caller = caller
        self._used_s = time.monotonic()
        self._context = context
        self._raw_write = write
        self._lock = asyncio.Lock()
        self._sessions: dict[int, Session] = {}
        self._ended: OrderedDict[int, str] = OrderedDict()

    async def serve(self, messages: AsyncIterator[Message]) -> None:
        """Returns when the caller sends no more and has every answer; its sessions have ended then."""
        try:
            async for message in messages:
                await self._take(message)
            for session in list(self._sessions.values()):
                await session.wait_answered()
        finally:
            for session in list(self._sessions.values()):
                session.drop(EndCause.DISCONNECTED)

    def check(self, now_s: float) -> bool:
        """Ends the sessions that were silent for too long.

        Returns whether the stream must end too: its caller has stopped reading, or has had no session for long.
        """
        self._forget_ended()
        for id_, session in list(self._sessions.items()):
            overdue = session.overdue(now_s)
            if overdue is not None:
                cause, sentence = overdue
                is_stalled = session.is_writing
                self._remember(id_, f"{sentence}; start a new session.")
                session.drop(cause, sentence)
                del self._sessions[id_]
                if is_stalled:
                    return True
        if any(not session.is_over for session in self._sessions.values()):
            self._used_s = now_s
        return now_s - self._used_s > EMPTY_BY_IDLE * self._context.limits.idle_s

    async def _take(self, message: Message) -> None:
        self._forget_ended()
        try:
            request = read_request(message, self._context.speakers)
        except InputError as error:
            await self._refuse(message, error)
            return
        session = await self._current(request.session, request.start)
        if request.start:
            if session is not None:
                live = InputError(
                    f"session {request.session} is live already; start the new session under another sequence id."
                )
                await session.refuse(request.request_id, live)
                return
            if len(self._sessions) >= MAX_SESSIONS:
                full = InputError(f"the stream has {MAX_SESSIONS} sessions already; open another stream.")
                await self._write(error_response(request.request_id, _text(full)))
                return
            self._ended.pop(request.session, None)
            session = self._sessions[request.session] = Session(
                request.session, self._caller, self._context, self._write
            )
        elif session is None:
            await self._write(error_response(request.request_id, self._unknown(request)))
            return
        await session.put(request)

    async def _current(self, id_: int, start: bool = False) -> Session | None:
        """The session that takes the next request with this id; waits for the end of one that takes none."""
        session = self._sessions.get(id_)
        if session is not None and (session.is_ending or (start and session.failure is not None)):
            await session.wait_answered()  # no answer of the next session with this id comes before
            self._forget(id_)
            return None
        return session

    async def refuse_unread(self, error: InputError) -> None:
        """Answers a request that is not even parsed."""
        self._context.meter.add(metrics.SESSIONS_REFUSED, reason=RefusalReason.INPUT)
        await self._write(error_response("", _text(error)))

    async def _refuse(self, message: Message, error: InputError) -> None:
        """Answers a request that cannot be read, in the order of its session if it is live."""
        session = await self._current(sequence_of(message))
        if session is not None and not session.is_over:
            await session.refuse(message.id[:MAX_REQUEST_ID_CHARS], error)
            return
        self._context.meter.add(metrics.SESSIONS_REFUSED, reason=RefusalReason.INPUT)
        await self._write(error_response(message.id[:MAX_REQUEST_ID_CHARS], _text(error)))

    async def _write(self, answer: bytes) -> None:
        async with self._lock:
            await self._raw_write(answer)

    def _forget_ended(self) -> None:
        for id_ in [id_ for id_, session in self._sessions.items() if session.is_over]:
            self._forget(id_)

    def _forget(self, id_: int) -> None:
        session = self._sessions.pop(id_, None)
        if session is not None:
            session.stop()

    def _remember(self, id_: int, sentence: str) -> None:
        self._ended[id_] = sentence
        while len(self._ended) > REMEMBERED_ENDS:
            self._ended.popitem(last=False)

    def _unknown(self, request: CallerRequest) -> str:
        reason = self._ended.get(request.session)
        return _text(
            SessionError(
                reason
                or f"session {request.session} is not open on this stream: it was never started here, or has ended; "
                "send START with the first request of a session, and all its requests on one stream."
            )
        )


def _text(error: LiveAvatarError) -> str:
    failure = describe(error, GATEWAY, NO_BLOCK)
    return format_error(failure.code, str(failure))
