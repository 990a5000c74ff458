"""Rooms of LiveKit without a server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from livekit import rtc


class StubRoom:
    """As much of a room as LiveKit's avatar modules ask for: connected, takes tracks, and may be linked to another.

    A linked room has the other one's participant; byte streams and calls go there, as through a server.
    """

    def __init__(self, identity: str = "agent", kind: int = rtc.ParticipantKind.PARTICIPANT_KIND_AGENT) -> None:
        self.local_participant = self
        self.identity = identity
        self.kind = kind
        self.state = rtc.ParticipantState.PARTICIPANT_STATE_ACTIVE
        self.remote_participants: dict[str, StubRoom] = {}
        self.tracks: list[rtc.Track] = []
        self._rpc_handlers: dict[str, Callable[..., str]] = {}
        self._stream_handlers: dict[str, Callable[..., None]] = {}

    def isconnected(self) -> bool:
        return True

    def on(self, *_: object) -> None: ...

    def off(self, *_: object) -> None: ...

    async def publish_track(self, track: rtc.Track, _: object) -> StubRoom:
        self.tracks.append(track)
        return self

    async def wait_for_subscription(self) -> None: ...

    def register_rpc_method(self, method: str, handler: Callable[..., str]) -> None:
        self._rpc_handlers[method] = handler

    async def perform_rpc(self, *, destination_identity: str, method: str, payload: str) -> str:
        await asyncio.sleep(0)
        call = SimpleNamespace(caller_identity=self.identity, payload=payload)
        return self.remote_participants[destination_identity]._rpc_handlers[method](call)

    def register_byte_stream_handler(self, topic: str, handler: Callable[..., None]) -> None:
        self._stream_handlers[topic] = handler

    async def stream_bytes(
        self, *, topic: str, destination_identities: list[str], attributes: dict[str, str], **_: object
    ) -> StubStream:
        await asyncio.sleep(0)
        stream = StubStream(attributes)
        self.remote_participants[destination_identities[0]]._stream_handlers[topic](stream, self.identity)
        return stream


class StubStream:
    """Both ends of a byte stream."""

    def __init__(self, attributes: dict[str, str]) -> None:
        self.info = SimpleNamespace(attributes=attributes, stream_id="stream")
        self._chunks: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def write(self, data: bytes) -> None:
        await self._chunks.put(data)

    async def aclose(self) -> None:
        await self._chunks.put(None)

    async def __anext__(self) -> bytes:
        chunk = await self._chunks.get()
        if chunk is None:
            raise StopAsyncIteration
        return chunk


def linked(agent: StubRoom, avatar: StubRoom) -> tuple[Any, Any]:
    """Two rooms that are one, seen by its two participants."""
    agent.remote_participants[avatar.identity] = avatar
    avatar.remote_participants[agent.identity] = agent
    return agent, avatar
