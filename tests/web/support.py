"""Talks to the web server as a page does."""

from __future__ import annotations

import asyncio
import io
import json
import struct
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from PIL import Image
from websockets.asyncio.client import ClientConnection, connect

from live_avatar.arrays import Array
from live_avatar_client.protocol import BLOCK_SAMPLES
from live_avatar_client.web.protocol import VERSION

PATIENCE_S = 60.0
START = {"type": "session.start", "version": VERSION, "portrait": "Robin"}


@dataclass(frozen=True, eq=False)
class Shown:
    """A block as it comes to a page. sound int16 [640 n]; jpegs: n files."""

    is_speech: bool
    turn: int
    first_frame: int
    sound: Array
    jpegs: tuple[bytes, ...]

    def frames(self) -> Array:
        """uint8 [n, H, W, 3]"""
        return np.stack([np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")) for jpeg in self.jpegs])


def shown(message: bytes) -> Shown:
    """Reads a block as docs/web.md describes it."""
    kind, is_speech, count, turn, first_frame, sound_bytes = struct.unpack_from("<BBHIII", message)
    assert kind == 3
    sizes = struct.unpack_from(f"<{count}I", message, 16)
    at = 16 + 4 * count
    sound = np.frombuffer(message[at : at + sound_bytes], "<i2")
    jpegs, at = [], at + sound_bytes
    for size in sizes:
        jpegs.append(message[at : at + size])
        at += size
    assert at == len(message)
    return Shown(bool(is_speech), turn, first_frame, sound, tuple(jpegs))


class Talker:
    """A visitor whose page is this program."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.ready: dict[str, Any] = {}

    async def send(self, **fields: object) -> None:
        await self.socket.send(json.dumps(fields))

    async def start(self, **fields: object) -> None:
        await self.send(**{**START, **fields})

    async def receive(self) -> dict[str, Any] | Shown:
        async with asyncio.timeout(PATIENCE_S):
            message = await self.socket.recv()
        return shown(message) if isinstance(message, bytes) else json.loads(message)

    async def error(self) -> dict[str, Any]:
        """The next error; blocks before it are dropped."""
        while True:
            message = await self.receive()
            if isinstance(message, dict) and message["type"] == "error":
                return message

    async def block(self) -> Shown:
        """The next block; an error before it fails the test."""
        message = await self.receive()
        assert isinstance(message, Shown), message
        return message

    async def speak(self, samples: Array, turn: int = 0) -> None:
        await self.socket.send(struct.pack("<BxxxI", 2, turn) + samples.astype("<i2").tobytes())

    async def speech(self, samples: int) -> Array:
        """The sound from the first block that speaks on: so many samples, and the silence that may be before them."""
        parts: list[Array] = []
        while sum(map(len, parts)) < samples + BLOCK_SAMPLES:
            block = await self.block()
            if parts or block.is_speech:
                parts.append(block.sound)
        return np.concatenate(parts)


def assert_said(sound: Array, expected: Array) -> None:
    """A sound has the expected samples in one piece, begun in its first block."""
    begin = int(np.flatnonzero(expected)[0])
    head = expected[begin : begin + 100]
    places = [
        place
        for place in range(min(BLOCK_SAMPLES, len(sound) - len(expected)) + 1)
        if np.array_equal(sound[place + begin : place + begin + 100], head)
    ]
    assert any(np.array_equal(sound[place : place + len(expected)], expected) for place in places), places


@asynccontextmanager
async def visiting(page: str, **options: Any) -> AsyncIterator[Talker]:
    """A connection that has sent nothing."""
    async with connect(page.replace("http", "ws", 1) + "/talk", proxy=None, max_size=None, **options) as socket:
        yield Talker(socket)


@asynccontextmanager
async def talking(page: str, picture: bytes | None = None, **fields: object) -> AsyncIterator[Talker]:
    """A conversation that is ready. The place of one before it is free when its blocks under way are done."""
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        async with visiting(page) as talker:
            await talker.start(**fields)
            if picture is not None:
                await talker.socket.send(b"\x01" + picture)
            message = await talker.receive()
            assert isinstance(message, dict)
            if message["type"] == "session.ready":
                talker.ready = message
                yield talker
                return
            assert message["code"] == "full", message
            assert time.monotonic() < deadline_s, "no place became free"
        await asyncio.sleep(0.1)


def save(page: str, path: str, **headers: str) -> tuple[int, bytes]:
    """What the page's server answers to a page that fetches a recording: status and body."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(page + path, b"", headers, method="POST")
    try:
        with opener.open(request, timeout=PATIENCE_S) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


@dataclass(frozen=True, eq=False)
class Film:
    """A recording. frames uint8 [n, H, W, 3]; sound float32 [samples] in [-1, 1], from the first frame on."""

    frames: Array
    times_s: list[float]
    sound: Array
    metadata: dict[str, str]


def film(file: bytes) -> Film:
    """Reads an MP4 with PyAV."""
    frames, times_s, parts = [], [], []
    with av.open(io.BytesIO(file)) as container:
        metadata = dict(container.metadata)
        for frame in container.decode(container.streams.video[0], container.streams.audio[0]):
            if isinstance(frame, av.VideoFrame):
                frames.append(frame.to_ndarray(format="rgb24"))
                times_s.append(float(frame.time or 0))
            else:
                assert frame.sample_rate == 16_000
                parts.append((round(frame.time * 16_000), frame.to_ndarray()[0]))
    sound = np.zeros(max(at + len(part) for at, part in parts), np.float32)
    for at, part in parts:
        sound[max(0, at) : at + len(part)] = part[max(0, -at) :]
    return Film(np.stack(frames), times_s, sound, metadata)
