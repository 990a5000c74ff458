"""Sessions that live on between speeches: barge-in, idle silence, quiet sessions and a slow reader."""

import asyncio
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from live_avatar_client import AnswerTimeout, AsyncAvatarSession, AvatarSession, Block, SessionBusy, SessionClosed
from live_avatar_client.pacing import BLOCK_S
from live_avatar_client.protocol import BLOCK_SAMPLES
from live_avatar_client.testing import (
    SAMPLE_IMAGE,
    SAMPLE_PROVENANCE,
    FakeAvatarServer,
    sample_speech,
    synthetic_frame,
)

OLD, NEW = sample_speech(20 * BLOCK_SAMPLES), sample_speech(BLOCK_SAMPLES + 700)


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.005)
    return condition()


def interrupt_sync(url: str, **options: Any) -> list[Block]:
    with AvatarSession(url, image=SAMPLE_IMAGE, **options) as session:
        sender = threading.Thread(target=session.send, args=(OLD,))
        sender.start()
        blocks = iter(session)
        read = [next(blocks), next(blocks)]
        session.interrupt()
        sender.join(60)
        assert not sender.is_alive()
        session.send(NEW)
        session.end()
        return read + list(blocks)


def interrupt_async(url: str, **options: Any) -> list[Block]:
    async def play() -> list[Block]:
        async with AsyncAvatarSession(url, image=SAMPLE_IMAGE, **options) as session:
            sender = asyncio.create_task(session.send(OLD))
            blocks = aiter(session)
            read = [await anext(blocks), await anext(blocks)]
            await session.interrupt()
            await asyncio.wait_for(sender, 60)
            await session.send(NEW)
            await session.end()
            return read + [block async for block in blocks]

    return asyncio.run(play())


@pytest.mark.parametrize("play", [interrupt_sync, interrupt_async])
@pytest.mark.parametrize("lookahead", [0, 5])
def test_an_interrupt_while_a_chunk_waits(play: Callable[..., list[Block]], lookahead: int) -> None:
    with FakeAvatarServer(lookahead_frames=lookahead, delay_s=0.02, height=4, width=6) as server:
        blocks = play(server.url, max_in_flight_blocks=3, max_unread_blocks=4, seed=9)
    (session,) = server.sessions
    fresh = [b for b in blocks[2:] if not b.stale]
    begin = fresh[0].first_frame
    assert begin % 12 == 0
    assert 2 * 12 <= begin < 20 * 12  # what was in flight came, the rest of 20 blocks was dropped
    assert not blocks[0].stale
    assert not blocks[1].stale
    assert [b.stale for b in blocks[2:]] == [b.first_frame < begin for b in blocks[2:]]
    assert [n for b in blocks for n in range(b.first_frame, b.first_frame + len(b))] == list(range(begin + 14))
    assert np.array_equal(np.concatenate([b.audio for b in fresh])[: len(NEW)], NEW)
    assert np.array_equal(session.speech[begin * 640 :][: len(NEW)], NEW)
    frames = np.concatenate([b.frames for b in blocks])
    assert np.array_equal(frames, [synthetic_frame(n, 9, session.speech, 4, 6) for n in range(len(frames))])
    assert session.end_reason == "completed"


def idle_sync(url: str) -> list[Block]:
    with AvatarSession(url, image=SAMPLE_IMAGE, idle=True) as session:
        blocks = iter(session)
        read = [next(blocks) for _ in range(3)]
        session.send(NEW)
        session.end()
        return read + list(blocks)


def idle_async(url: str) -> list[Block]:
    async def play() -> list[Block]:
        async with AsyncAvatarSession(url, image=SAMPLE_IMAGE, idle=True) as session:
            blocks = aiter(session)
            read = [await anext(blocks) for _ in range(3)]
            await session.send(NEW)
            await session.end()
            return read + [block async for block in blocks]

    return asyncio.run(play())


@pytest.mark.parametrize("play", [idle_sync, idle_async])
def test_an_idle_avatar_moves_in_real_time(play: Callable[[str], list[Block]]) -> None:
    with FakeAvatarServer() as server:
        opened_s = time.monotonic()
        blocks = play(server.url)
    silent = list(itertools.takewhile(lambda block: not block.audio.any(), blocks))
    spoken = blocks[len(silent) :]
    assert len(silent) >= 3  # more where the test's thread is late
    assert silent[2].sent_at_s - opened_s > 2 * BLOCK_S  # the exact pace: test_client_core
    assert np.array_equal(np.concatenate([block.audio for block in spoken])[: len(NEW)], NEW)
    assert sum(map(len, blocks)) == 12 * len(silent) + 14
    assert len(server.sessions[0].blocks) == len(silent) + 2


def test_quiet_sessions_keep_themselves_alive() -> None:
    def are_kept_alive(sessions: int) -> bool:
        """The exact pace: test_client_core."""
        return [session.keep_alives >= 4 for session in server.sessions] == [True] * sessions

    async def be_quiet(url: str) -> None:
        async with AsyncAvatarSession(url, image=SAMPLE_IMAGE, keep_alive_s=0.05):
            while not are_kept_alive(2):
                await asyncio.sleep(0.01)

    with FakeAvatarServer() as server:
        with AvatarSession(server.url, image=SAMPLE_IMAGE, keep_alive_s=0.05):
            assert wait_for(lambda: are_kept_alive(1))  # the user's thread is elsewhere
        asyncio.run(asyncio.wait_for(be_quiet(server.url), 60))
    assert [session.blocks for session in server.sessions] == [[], []]


def test_a_sender_that_does_not_wait() -> None:
    async def send(url: str) -> None:
        async with AsyncAvatarSession(url, image=SAMPLE_IMAGE, max_unread_blocks=2) as session:
            await session.send(OLD[: 2 * BLOCK_SAMPLES], wait=False)
            with pytest.raises(SessionBusy, match="completes 1 blocks, and 0 can be sent now"):
                await session.send(OLD[:BLOCK_SAMPLES], wait=False)

    with FakeAvatarServer() as server:
        with AvatarSession(server.url, image=SAMPLE_IMAGE, max_unread_blocks=2) as session:
            session.send(OLD[: 2 * BLOCK_SAMPLES], wait=False)
            with pytest.raises(SessionBusy, match="completes 1 blocks, and 0 can be sent now"):
                session.send(OLD[:BLOCK_SAMPLES], wait=False)
            next(iter(session))
            session.send(OLD[:BLOCK_SAMPLES], wait=False)
            session.end()
            assert sum(map(len, session)) == 24
        asyncio.run(send(server.url))
    assert [len(session.blocks) for session in server.sessions] == [3, 2]


@pytest.mark.parametrize("idle", [False, True])
def test_a_reader_that_sleeps_costs_bounded_memory(idle: bool) -> None:
    with FakeAvatarServer() as server:
        options: dict[str, Any] = {"image": SAMPLE_IMAGE, "max_in_flight_blocks": 2, "max_unread_blocks": 3}
        with AvatarSession(server.url, idle=idle, **options) as session:
            assert not idle or wait_for(lambda: bool(server.sessions and server.sessions[0].blocks))
            feeder = session.stream([OLD])
            next(feeder)
            (received,) = server.sessions
            core = session._core
            assert wait_for(lambda: len(received.blocks) == 4 and len(core._unread) == 3)
            time.sleep(0.6)
            assert len(received.blocks) == 4  # one read, three unread
            assert sum(len(block.frames) for block in core._unread) == 36
            assert len(core._sent) <= 1
            assert len(core._in_flight) == 0
            assert sum(map(len, feeder)) == (19 + idle) * 12  # an idle session begins with a block of silence


def test_provenance_is_there_with_the_first_frames() -> None:
    async def play(url: str) -> None:
        async with AsyncAvatarSession(url, image=SAMPLE_IMAGE, seed=5) as session:
            async for _ in session.stream([NEW]):
                assert session.provenance == {**SAMPLE_PROVENANCE, "seed": 5}

    with FakeAvatarServer() as server:
        session = AvatarSession(server.url, image=SAMPLE_IMAGE)
        assert session.provenance is None
        with session:
            for _ in session.stream([NEW]):
                assert session.provenance == SAMPLE_PROVENANCE
        asyncio.run(play(server.url))


@pytest.mark.parametrize("options", [{"idle": True}, {"keep_alive_s": 0.2}])
def test_a_server_that_hangs_in_a_pause_is_noticed(options: dict[str, Any]) -> None:
    with FakeAvatarServer() as server:
        with AvatarSession(server.url, image=SAMPLE_IMAGE, answer_timeout_s=0.5, **options) as session:
            assert wait_for(lambda: bool(server.sessions))
            server.answers = lambda request: server._stopping.wait()  # type: ignore[method-assign]
            with pytest.raises(AnswerTimeout, match=r"has answered nothing for 0\.5 s"):
                list(session)
        server.stop()


def test_a_session_entered_twice_goes_on() -> None:
    with FakeAvatarServer() as server, AvatarSession(server.url, image=SAMPLE_IMAGE) as session:
        with pytest.raises(SessionClosed, match="was opened before"), session:
            pass
        assert sum(map(len, session.stream([OLD[:BLOCK_SAMPLES]]))) == 12
