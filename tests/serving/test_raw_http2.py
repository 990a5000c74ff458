"""Broken and hostile HTTP/2 and gRPC framing at the callers' port of a real server: it lives, its memory is bounded,
and others are served."""

from __future__ import annotations

import gzip
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from live_avatar.arrays import Array
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.serving.server import TritonServer, serving
from live_avatar.serving.server_options import ServerOptions
from tests.serving.http2 import (
    END_HEADERS,
    END_STREAM,
    LIMIT_S,
    PREFACE,
    Connection,
    Kind,
    call,
    call_headers,
    frame,
    literal,
    message,
    setting,
)
from tests.serving.support import neighbour, watched

ROUNDS = 150
"""Connections with frames drawn at random."""
FLOOD = 20_000
"""Frames of a flood, unless the connection is closed before."""
ANSWER_S = 1.0
MOST_MIB = 160.0
"""By how much a process may be larger at any moment than at the start."""
ATTACK_S = 300.0
"""An attack that the server answers, or ends, takes less; each is bounded in bytes."""


@pytest.fixture(scope="module")
def door(artifacts: Artifacts) -> Iterator[TritonServer]:
    with serving(ServerOptions(artifacts.folder, max_sessions=2, starts_per_minute=10_000).on_free_ports()) as running:
        yield running


Attack = Callable[[int, random.Random], None]


def junk(rng: random.Random, most: int) -> bytes:
    return rng.randbytes(rng.randint(0, most))


def random_frame(rng: random.Random) -> bytes:
    """A frame of any type, on any stream, whose length may be a lie, around what may belong there."""
    payload = rng.choice(
        [
            lambda: junk(rng, 40),
            lambda: call_headers(),
            lambda: message(junk(rng, 60), rng.choice([0, 0, 1, 2]), rng.choice([None, None, 0, 5, 2**32 - 1])),
            lambda: setting(rng.randint(0, 8), rng.choice([0, 1, 2**14, 2**24, 2**31 - 1, 2**32 - 1])),
            lambda: rng.randint(0, 2**32 - 1).to_bytes(4, "big"),
        ]
    )()
    length = rng.choice([None] * 8 + [0, 1, 2**14, 2**24 - 1])
    return frame(
        rng.randint(0, 12), payload, rng.choice([0, 1, 1, 3, 2, 2**31 - 1, 2**32 - 1]), junk_flags(rng), length
    )


def junk_flags(rng: random.Random) -> int:
    return rng.choice([0, END_STREAM, END_HEADERS, END_STREAM | END_HEADERS, rng.randint(0, 255)])


def broken_frames(port: int, rng: random.Random) -> None:
    for _ in range(ROUNDS):
        with Connection(port) as connection:
            if rng.random() < 0.5:
                connection.send(call(1))
            connection.send(b"".join(random_frame(rng) for _ in range(rng.randint(1, 15))))
            connection.read(0.02)


def no_http2(port: int, rng: random.Random) -> None:
    for start in (
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        PREFACE[:10],
        b"\x16\x03\x01\x02\x00\x01",
        PREFACE.lower(),
    ):
        for _ in range(10):
            with Connection(port, greets=False) as connection:
                connection.send(start + junk(rng, 3000))
                connection.read(0.02)


def many_headers(port: int, rng: random.Random) -> None:
    """More than the limit of metadata, in one block and in many calls."""
    for block in (
        call_headers() + b"".join(literal(b"x-%d" % n, b"y" * 100) for n in range(120)),
        call_headers() + literal(b"x", b"y" * 16_000),
        call_headers() + literal(b":path", b"/twice"),
        literal(b":path", b"/"),
        call_headers() + literal(b"UPPER", b"a\r\n\0b"),
        call_headers() + b"\xff\xff\xff\xff\xff\xff\xff\xff\xff",
    ):
        for _ in range(20):
            with Connection(port) as connection:
                connection.send(call(1, block[:16_384]) + frame(Kind.DATA, message(b""), 1, END_STREAM))
                connection.read(0.02)


def endless_continuation(port: int, rng: random.Random) -> None:
    """CVE-2024-27316: a header block that never ends."""
    for piece in (literal(b"x-flood", b"y" * 16_000), b""):
        with Connection(port) as connection:
            connection.send(call(1, flags=0))
            many = frame(Kind.CONTINUATION, piece, 1) * 10
            for _ in range(200 if piece else FLOOD // 10):
                if not connection.send(many):
                    break
            connection.read(ANSWER_S)


def table_bomb(port: int, rng: random.Random) -> None:
    """A large entry of HPACK's table, which each byte then names once more."""
    with Connection(port) as connection:
        connection.send(call(1, call_headers() + literal(b"x", b"y" * 3900, 0x40), END_HEADERS | END_STREAM))
        for number in range(200):
            if not connection.send(call(3 + 2 * number, call_headers() + b"\xbe" * 16_000, END_HEADERS | END_STREAM)):
                break
        connection.read(ANSWER_S)


def rapid_reset(port: int, rng: random.Random) -> None:
    """CVE-2023-44487: calls that are cancelled at once."""
    with Connection(port) as connection:
        for start in range(1, 2 * FLOOD, 200):
            calls = range(start, start + 200, 2)
            if not connection.send(b"".join(call(n) + frame(Kind.RST_STREAM, bytes(4), n) for n in calls)):
                break
        connection.read(ANSWER_S)


def made_reset(port: int, rng: random.Random) -> None:
    """CVE-2025-8671: the server is made to reset calls itself."""
    with Connection(port) as connection:
        for start in range(1, 2 * FLOOD, 200):
            wrong = b"".join(call(n) + frame(Kind.WINDOW_UPDATE, bytes(4), n) for n in range(start, start + 200, 2))
            if not connection.send(wrong):
                break
        connection.read(ANSWER_S)


def floods(port: int, rng: random.Random) -> None:
    """Small frames, most of which ask for an answer that nobody reads."""
    for small in (
        frame(Kind.SETTINGS),
        frame(Kind.SETTINGS, setting(4, 65_535) * 100),
        frame(Kind.PING, bytes(8)),
        frame(Kind.PRIORITY, bytes(5), 1),
        frame(Kind.WINDOW_UPDATE, b"\0\0\0\1"),
        frame(Kind.DATA, b"", 1),
        frame(Kind.RST_STREAM, bytes(4), 1),
        frame(11, b"unknown"),
    ):
        with Connection(port) as connection:
            connection.send(call(1))
            for _ in range(FLOOD // 100):
                if not connection.send(small * 100):
                    break


def windows(port: int, rng: random.Random) -> None:
    """Windows that overflow, are nothing or change all the time, around calls that are answered."""
    most = frame(Kind.WINDOW_UPDATE, b"\x7f\xff\xff\xff")
    for start in (
        most * 3,
        frame(Kind.SETTINGS, setting(4, 0)),
        frame(Kind.SETTINGS, setting(4, 2**31 - 1)),
        frame(Kind.SETTINGS, setting(4, 2**32 - 1)),
        frame(Kind.SETTINGS, setting(5, 2**24 - 1) + setting(1, 2**32 - 1) + setting(6, 0) + setting(3, 0)),
    ):
        for _ in range(10):
            with Connection(port) as connection:
                connection.send(start)
                for number in range(1, 200, 2):
                    connection.send(call(number) + frame(Kind.DATA, message(b"\xff" * 40), number, END_STREAM))
                connection.read(0.05)


def false_lengths(port: int, rng: random.Random) -> None:
    """Messages that say that they have more or less than comes, or are compressed when they are not."""
    bomb = gzip.compress(bytes(48 << 20))
    for encoding, content in (
        ("identity", message(b"\x0a", length=2**32 - 1)),
        ("identity", message(b"\x0a", length=32 << 20)),
        ("identity", message(b"\x0a" * 100, length=3)),
        ("identity", message(b"\x0a", compressed=1)),
        ("identity", message(b"\x0a", compressed=255)),
        ("gzip", message(b"no gzip", compressed=1)),
        ("gzip", message(bomb, compressed=1)),
        ("deflate", message(bomb, compressed=1)),
        ("unheard-of", message(b"\x0a", compressed=1)),
        ("gzip" * 500, message(b"\x0a", compressed=1)),
        ("identity", b"\0\0"),
    ):
        for end in (END_STREAM, 0):
            with Connection(port) as connection:
                connection.send(call(1, call_headers(grpc_encoding=encoding)))
                for start in range(0, len(content), 16_384):
                    last = start + 16_384 >= len(content)
                    connection.send(frame(Kind.DATA, content[start : start + 16_384], 1, end if last else 0))
                connection.read(0.2)


def half_open(port: int, rng: random.Random) -> None:
    """A message of 32 MiB that stops in its middle, on as many streams as a connection may have."""
    with Connection(port) as connection:
        for number in range(1, 129, 2):
            connection.send(call(number) + frame(Kind.DATA, message(bytes(16_000), length=32 << 20), number))
        connection.read(ANSWER_S)


ATTACKS: tuple[Attack, ...] = (
    broken_frames,
    no_http2,
    many_headers,
    endless_continuation,
    table_bomb,
    rapid_reset,
    made_reset,
    floods,
    windows,
    false_lengths,
    half_open,
)
QUICK = (no_http2, table_bomb, rapid_reset, false_lengths)


def resident_mib(process: int) -> float:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * 4096 / 2**20


def test_a_right_call_by_hand_is_answered(door: TritonServer) -> None:
    """So the attacks are wrong where they mean to be."""
    with Connection(door.options.grpc_port) as connection:
        connection.send(call(1) + frame(Kind.DATA, message(b"\xff" * 40), 1, END_STREAM))
        refusal = b"the message is no ModelInferRequest"
        assert refusal in connection.read(LIMIT_S, until=refusal)


@pytest.mark.parametrize(
    "attack",
    [pytest.param(attack, id=attack.__name__, marks=() if attack in QUICK else pytest.mark.slow) for attack in ATTACKS],
)
def test_the_server_lives_and_serves_others(door: TritonServer, speech: Array, expected: Array, attack: Attack) -> None:
    gateway, begun_s = door.gateway.process_id, time.monotonic()
    before = resident_mib(gateway)
    with watched(door) as memory, neighbour(door.options.url, speech[: 7680 * 3], expected[:36]):
        attack(door.options.grpc_port, random.Random(attack.__name__))
        took_s = time.monotonic() - begun_s
    assert took_s < ATTACK_S
    for (name, _), series in memory.series.items():
        if name != "this process" and series.mib:
            assert max(series.mib) - series.mib[0] < MOST_MIB, f"{name} has grown from {series.mib[0]:.0f} MiB"
    assert resident_mib(gateway) - before < MOST_MIB
