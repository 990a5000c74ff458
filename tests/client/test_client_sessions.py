"""Sync and asyncio sessions against a real gRPC server: every way in which a stream can end."""

import asyncio
import gc
import io
import itertools
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from live_avatar_client import (
    AnswerTimeout,
    AsyncAvatarSession,
    AvatarError,
    AvatarSession,
    Block,
    ConnectFailed,
    ConnectionLost,
    ErrorCode,
    InvalidInput,
    MediaError,
    SendTimeout,
    ServerIncompatible,
    SessionClosed,
    SessionFailed,
    SessionRefused,
    StreamStats,
)
from live_avatar_client.protocol import BLOCK_SAMPLES
from live_avatar_client.testing import SAMPLE_IMAGE, FakeAvatarServer, sample_speech, synthetic_frame

Play = Callable[..., list[Block]]


def play_sync(url: str, chunks: Iterable[object], **options: Any) -> list[Block]:
    with AvatarSession(url, **{"image": SAMPLE_IMAGE, **options}) as session:
        return list(session.stream(chunks))


def play_sync_in_one_thread(url: str, chunks: Iterable[object], **options: Any) -> list[Block]:
    with AvatarSession(url, **{"image": SAMPLE_IMAGE, **options}) as session:
        for chunk in chunks:
            session.send(chunk)
        session.end()
        return list(session)


def play_async(url: str, chunks: Iterable[object], **options: Any) -> list[Block]:
    async def play() -> list[Block]:
        async with AsyncAvatarSession(url, **{"image": SAMPLE_IMAGE, **options}) as session:
            return [block async for block in session.stream(chunks)]

    return asyncio.run(play())


every_way = pytest.mark.parametrize("play", [play_sync, play_sync_in_one_thread, play_async])
both_ways = pytest.mark.parametrize("play", [play_sync, play_async])


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.005)
    return condition()


@every_way
@pytest.mark.parametrize("lookahead", [0, 5, 12, 30])
@pytest.mark.parametrize("samples", [1, BLOCK_SAMPLES, 50_001])
def test_every_frame_of_the_speech(play: Play, lookahead: int, samples: int) -> None:
    speech = sample_speech(samples)
    with FakeAvatarServer(lookahead_frames=lookahead, height=4, width=6) as server:
        blocks = play(server.url, np.array_split(speech, 7), seed=300, prompt="a rainy évening")
    received = np.concatenate([block.frames for block in blocks])
    padded = np.pad(speech, (0, BLOCK_SAMPLES))
    expected = [synthetic_frame(n, 300, padded, 4, 6) for n in range(-(-samples // 640))]
    assert np.array_equal(received, np.stack(expected))
    (session,) = server.sessions
    assert (session.image, session.prompt, session.seed) == (SAMPLE_IMAGE, "a rainy évening", 300)
    assert np.array_equal(session.speech[:samples], speech)
    assert session.ended
    assert not session.failed


@both_ways
def test_what_the_server_is_told(play: Play) -> None:
    with FakeAvatarServer() as server:
        play(server.url, [sample_speech(9000)], label="AI-generated · 生成", jpeg_quality=7)
        play(server.url, [sample_speech(9000)])
    first, second = server.sessions
    assert (first.label, first.jpeg_quality, first.end_reason) == ("AI-generated · 生成", 7, "completed")
    assert (second.label, second.jpeg_quality) == ("", 90)
    assert {len(session.token) for session in server.sessions} == {32}
    assert first.token != second.token


@both_ways
def test_jpeg_frames(play: Play) -> None:
    with FakeAvatarServer() as server:
        blocks = play(server.url, [sample_speech(9000)], frame_format="jpeg")
        coarse = play(server.url, [sample_speech(9000)], frame_format="jpeg", jpeg_quality=1)
    assert coarse[0].jpegs[0] != blocks[0].jpegs[0]
    assert [len(block) for block in blocks] == [12, 3]
    assert [block.frames.shape for block in blocks] == [(0, 32, 48, 3)] * 2
    assert Image.open(io.BytesIO(blocks[1].jpegs[2])).size == (48, 32)
    with pytest.raises(InvalidInput, match=r"frame_format is 'jpeg'; read Block.jpegs, or ask for 'raw'"):
        blocks[0].timed_frames()


def test_frames_with_timestamps() -> None:
    async def play(url: str) -> list[float]:
        async with AsyncAvatarSession(url, image=SAMPLE_IMAGE) as session:
            await session.send(sample_speech(9000))
            await session.end()
            return [timestamp_s async for timestamp_s, _ in session.frames()]

    with FakeAvatarServer() as server:
        with AvatarSession(server.url, image=SAMPLE_IMAGE) as session:
            session.send(sample_speech(9000))
            session.end()
            timed = list(session.frames())
        assert [timestamp_s for timestamp_s, _ in timed] == [n / 25 for n in range(15)]
        assert {frame.shape for _, frame in timed} == {(32, 48, 3)}
        assert asyncio.run(play(server.url)) == [n / 25 for n in range(15)]


def test_asynchronous_chunks_and_keep_alive() -> None:
    async def play(url: str) -> int:
        async with AsyncAvatarSession(url, image=SAMPLE_IMAGE) as session:

            async def chunks() -> AsyncIterator[object]:
                yield sample_speech(BLOCK_SAMPLES)
                await session.keep_alive()
                yield sample_speech(BLOCK_SAMPLES)

            return sum([len(block) async for block in session.stream(chunks())])

    with FakeAvatarServer() as server:
        assert asyncio.run(play(server.url)) == 24
    assert server.sessions[0].keep_alives == 1


def test_sync_keep_alive() -> None:
    with FakeAvatarServer() as server, AvatarSession(server.url, image=SAMPLE_IMAGE) as session:
        session.send(sample_speech(BLOCK_SAMPLES))
        session.keep_alive()
        session.end()
        assert sum(map(len, session)) == 12
    assert server.sessions[0].keep_alives == 1


@every_way
def test_a_refused_session(play: Play) -> None:
    sentence = "all 4 sessions are taken; try again in a moment"
    with FakeAvatarServer(refuse=sentence) as server:
        with pytest.raises(SessionRefused) as caught:
            play(server.url, [sample_speech(100_000)])
        assert wait_for(lambda: len(server.ended_ids) == 1)  # so that the server frees the id
    assert str(caught.value) == f"the server refused the session: {sentence}"
    assert caught.value.code is ErrorCode.UNAVAILABLE


@every_way
def test_a_failure_mid_stream(play: Play) -> None:
    with FakeAvatarServer(fail_at_block=3) as server:
        with pytest.raises(SessionFailed, match="ended the session: stage dit_step_2 failed at block 3: on"):
            play(server.url, [sample_speech(100_000)])
        assert wait_for(lambda: server.sessions[0].ended)
    assert server.sessions[0].end_reason == "failed"


def test_blocks_before_a_failure_are_given() -> None:
    with (
        FakeAvatarServer(fail_at_block=3) as server,
        AvatarSession(server.url, image=SAMPLE_IMAGE) as session,
    ):
        blocks = session.stream([sample_speech(100_000)])
        assert [next(blocks).index for _ in range(3)] == [0, 1, 2]
        with pytest.raises(SessionFailed):
            next(blocks)


@every_way
def test_a_server_that_cuts_the_connection(play: Play) -> None:
    with FakeAvatarServer(vanish_at_block=2) as server, pytest.raises(ConnectionLost) as caught:
        play(server.url, [sample_speech(100_000)])
    assert str(caught.value).startswith("the stream ended after 24")
    # grpc's asyncio API forgets the server's words when a write was under way.
    reason = "(the fake server vanished on purpose|Internal error from Core)"
    assert re.search(f"frames: {reason}; open a new session$", str(caught.value))


def test_a_server_that_is_killed() -> None:
    with FakeAvatarServer(delay_s=0.05) as server, AvatarSession(server.url, image=SAMPLE_IMAGE) as session:
        session.send(sample_speech(BLOCK_SAMPLES * 4))
        blocks = iter(session)
        next(blocks)
        server.stop()
        with pytest.raises(ConnectionLost):
            list(blocks)
        with pytest.raises(ConnectionLost):
            session.send(sample_speech(1))


@every_way
def test_a_silent_server(play: Play) -> None:
    with FakeAvatarServer(delay_s=600) as server:
        started_s = time.monotonic()
        with pytest.raises(AnswerTimeout, match=r"nothing for 0.2 s, with \d+ blocks sent; check the server"):
            play(server.url, [sample_speech(100_000)], answer_timeout_s=0.2)
        assert time.monotonic() - started_s < 60


@both_ways
def test_nobody_listens(play: Play) -> None:
    started_s = time.monotonic()
    with pytest.raises(ConnectFailed, match=r"no server answered at grpc://127.0.0.1:9 within 600 s: .*port"):
        play("grpc://127.0.0.1:9", [], connect_timeout_s=600)
    assert time.monotonic() - started_s < 60


@both_ways
def test_another_model(play: Play) -> None:
    with FakeAvatarServer(model_name="resnet") as server, pytest.raises(ServerIncompatible) as caught:
        play(server.url, [])
    assert str(caught.value) == (
        f"the server at {server.url} has no ready model 'live_avatar'; wait until it is loaded, or pass the "
        "address of a Live Avatar server"
    )


def test_another_kind_of_grpc_server() -> None:
    with futures.ThreadPoolExecutor(1) as workers:
        server = grpc.server(workers)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        with pytest.raises(ServerIncompatible, match="speaks gRPC but not KServe v2"):
            play_sync(f"127.0.0.1:{port}", [])
        server.stop(None).wait()


@both_ways
def test_an_error_of_the_chunks_is_raised(play: Play) -> None:
    def chunks() -> Iterator[object]:
        yield sample_speech(BLOCK_SAMPLES * 2)
        raise LookupError("no more words")

    with FakeAvatarServer() as server:
        with pytest.raises(LookupError, match="no more words"):
            play(server.url, chunks())
        assert wait_for(lambda: server.sessions[0].ended)


@both_ways
def test_a_chunk_of_the_wrong_kind(play: Play) -> None:
    with FakeAvatarServer() as server, pytest.raises(InvalidInput, match="pcm is a bytes"):
        play(server.url, [b"\0\0"])


@every_way
def test_no_speech(play: Play) -> None:
    with FakeAvatarServer() as server, pytest.raises(InvalidInput, match="nothing to say"):
        play(server.url, [])
    assert [session.blocks for session in server.sessions] == [[]]


def test_leaving_early_ends_the_session() -> None:
    async def leave(url: str) -> None:
        async with AsyncAvatarSession(url, image=SAMPLE_IMAGE) as session:
            async for _ in session.stream(itertools.repeat(sample_speech(1000))):
                break

    with FakeAvatarServer(delay_s=0.01) as server:
        with AvatarSession(server.url, image=SAMPLE_IMAGE) as session:
            next(session.stream(itertools.repeat(sample_speech(1000))))
        asyncio.run(leave(server.url))
        assert wait_for(lambda: [s.ended for s in server.sessions] == [True, True])
    assert [s.end_reason for s in server.sessions] == ["abandoned", "abandoned"]


def test_an_interrupt_ends_the_session_of_a_slow_server() -> None:
    def interrupted(url: str) -> None:
        with AvatarSession(url, image=SAMPLE_IMAGE) as session:
            session.send(sample_speech(20_000))
            raise KeyboardInterrupt

    with FakeAvatarServer(delay_s=600) as server:
        started_s = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            interrupted(server.url)
        assert time.monotonic() - started_s < 60


def test_cancelling_a_task_ends_its_session() -> None:
    async def play(url: str) -> None:
        async with AsyncAvatarSession(url, image=SAMPLE_IMAGE) as session:
            async for _ in session.stream([sample_speech(100_000)]):
                pass

    async def cancel(url: str) -> set[asyncio.Task[Any]]:
        task = asyncio.create_task(play(url))
        while not (server.sessions and server.sessions[0].blocks):
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return asyncio.all_tasks() - {asyncio.current_task()}

    with FakeAvatarServer(delay_s=0.05) as server:
        assert not asyncio.run(cancel(server.url))
        assert wait_for(lambda: server.sessions[0].ended)


def test_a_sender_that_waits_is_told_when_the_session_closes() -> None:
    caught: queue.Queue[BaseException] = queue.Queue()

    def send(session: AvatarSession) -> None:
        try:
            session.send(sample_speech(BLOCK_SAMPLES * 20))
        except AvatarError as error:
            caught.put(error)

    with FakeAvatarServer() as server:
        with AvatarSession(server.url, image=SAMPLE_IMAGE, max_unread_blocks=2) as session:
            sender = threading.Thread(target=send, args=(session,))
            sender.start()
            next(iter(session))
        sender.join()
    assert isinstance(caught.get_nowait(), SessionClosed)


@both_ways
def test_a_slow_reader_holds_the_sender_back(play: Play) -> None:
    options: dict[str, Any] = {"image": SAMPLE_IMAGE, "max_in_flight_blocks": 2, "max_unread_blocks": 3}
    given = 0

    def chunks() -> Iterator[object]:
        nonlocal given
        for _ in range(30):
            given += 1
            yield sample_speech(BLOCK_SAMPLES)

    async def play_slowly_async(url: str) -> tuple[int, int]:
        async with AsyncAvatarSession(url, **options) as session:
            blocks = session.stream(chunks())
            await anext(blocks)
            while given < 5:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            return given, len([block async for block in blocks])

    def play_slowly_sync(url: str) -> tuple[int, int]:
        with AvatarSession(url, **options) as session:
            blocks = session.stream(chunks())
            next(blocks)
            assert wait_for(lambda: given >= 5)
            time.sleep(0.1)
            return given, len(list(blocks))

    with FakeAvatarServer() as server:
        is_sync = play is play_sync
        played = play_slowly_sync(server.url) if is_sync else asyncio.run(play_slowly_async(server.url))
    assert played == (5, 29)  # given: one read, three unread, one that waits


def test_send_timeout() -> None:
    async def send(url: str) -> None:
        async with AsyncAvatarSession(url, image=SAMPLE_IMAGE, max_unread_blocks=2, send_timeout_s=0.1) as session:
            await session.send(sample_speech(BLOCK_SAMPLES * 3))

    with FakeAvatarServer() as server:
        with AvatarSession(server.url, image=SAMPLE_IMAGE, max_unread_blocks=2, send_timeout_s=0.1) as session:
            session.send(sample_speech(BLOCK_SAMPLES * 2))
            assert wait_for(lambda: len(session._core._unread) == 2)
            with pytest.raises(SendTimeout, match="and 2 of at most 2 are answered but unread"):
                session.send(sample_speech(BLOCK_SAMPLES))
        with pytest.raises(SendTimeout, match="do not send it again"):
            asyncio.run(send(server.url))


def test_a_session_is_used_once_and_when_open() -> None:
    with FakeAvatarServer() as server:
        session = AvatarSession(server.url, image=SAMPLE_IMAGE)
        with pytest.raises(SessionClosed, match=r"not open; use it in a `with` \(or `async with`\) s"):
            session.send(sample_speech(1))
        session.close()
        with session:
            session.close()
            with pytest.raises(SessionClosed, match="closed before the last frame"):
                session.send(sample_speech(1))
        with pytest.raises(SessionClosed, match="opened before; make a new one"), session:
            pass


def test_stats() -> None:
    with FakeAvatarServer(delay_s=0.02) as server:
        blocks = play_sync(server.url, np.array_split(sample_speech(BLOCK_SAMPLES * 5), 50))
    stats = StreamStats.from_blocks(iter(blocks))
    assert stats.frames == 60
    assert stats.fps == pytest.approx(60 / stats.duration_s)
    assert 0.1 < stats.duration_s < 60
    parts_s = stats.ttff_block_wait_s + stats.ttff_client_wait_s + stats.ttff_server_s
    assert stats.ttff_s == pytest.approx(parts_s)
    assert stats.ttff_server_s > 0.02
    assert 0.02 < stats.latency_p50_s <= stats.latency_p95_s <= stats.latency_max_s
    with pytest.raises(InvalidInput, match="0 blocks to measure"):
        StreamStats.from_blocks([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "http://localhost:8000"}, "has the scheme 'http', but frames are streamed over gRPC; pass"),
        ({"url": "localhost"}, "the address 'localhost' is not host:port; pass one such as 'localhost:8001'"),
        ({"url": "localhost:99999"}, "not host:port"),
        ({"url": "grpc://localhost:8001/v2"}, "not host:port"),
        ({"image": b""}, "the image has 0 bytes; pass a PNG, JPEG or WebP file"),
        ({"image": b"GIF89a.."}, r"starts with b'GIF89a..', which is no PNG, JPEG or WebP file"),
        ({"image": 5}, "image is a int; pass the bytes"),
        ({"prompt": "x" * 2001}, "prompt has 2001 characters; pass at most 2000"),
        ({"prompt": "\ud800"}, "prompt cannot be written as UTF-8"),
        ({"prompt": None}, "prompt is a NoneType; pass a str"),
        ({"seed": -1}, r"seed is -1; pass an int from 0 to 2\*\*63 - 1"),
        ({"seed": 1.5}, "seed is a float; pass an int"),
        ({"jpeg_quality": 96}, "jpeg_quality is 96; pass an int from 1 to 95"),
        ({"jpeg_quality": 0}, "jpeg_quality is 0; pass an int from 1 to 95"),
        ({"frames_per_response": 8}, "frames_per_response is 8; pass 4 or 12"),
        ({"frames_per_response": 13}, "frames_per_response is 13; pass 4 or 12"),
        ({"frames_per_response": "4"}, "frames_per_response is a str; pass an int"),
        ({"label": "x" * 65}, "label has 65 characters; pass at most 64"),
        ({"label": "a\nb"}, r"label is 'a\\nb'; pass one line of printable characters"),
        ({"label": None}, "label is a NoneType; pass a str"),
        ({"keep_alive_s": 0}, "keep_alive_s is 0; pass a number above 0"),
        ({"frame_format": "png"}, "frame_format is 'png'; pass 'raw' or 'jpeg'"),
        ({"max_unread_blocks": 0}, "max_unread_blocks is 0; pass a number above 0"),
        ({"send_timeout_s": float("nan")}, "send_timeout_s is nan; pass a number above 0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        AvatarSession(**{"url": "localhost:8001", "image": SAMPLE_IMAGE, **options})


def test_an_image_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "person.png"
    path.write_bytes(SAMPLE_IMAGE)
    with FakeAvatarServer() as server:
        play_sync(server.url, [sample_speech(1)], image=path)
    assert server.sessions[0].image == SAMPLE_IMAGE
    with pytest.raises(MediaError, match=r"none.png' does not exist; pass the path of a PNG, JPEG or WebP"):
        AvatarSession(server.url, image=tmp_path / "none.png")


def silence_forever() -> Iterator[object]:
    while True:
        time.sleep(0.02)
        yield np.zeros(320, np.int16)


def drop_when_open(server: FakeAvatarServer) -> None:
    session = AvatarSession(server.url, image=SAMPLE_IMAGE, keep_alive_s=0.05)
    session.__enter__()
    assert wait_for(lambda: server.streams == 1)


def drop_in_use(server: FakeAvatarServer) -> None:
    session = AvatarSession(server.url, image=SAMPLE_IMAGE, idle=True, keep_alive_s=0.05).__enter__()
    blocks = session.stream(silence_forever())
    next(blocks)


def drop_in_a_circle(server: FakeAvatarServer) -> None:
    session = AvatarSession(server.url, image=SAMPLE_IMAGE, keep_alive_s=0.05).__enter__()
    assert wait_for(lambda: server.streams == 1)
    session.circle = session  # type: ignore[attr-defined]
    del session
    gc.collect()


def drop_after_the_end(server: FakeAvatarServer) -> None:
    session = AvatarSession(server.url, image=SAMPLE_IMAGE, keep_alive_s=0.05).__enter__()
    session.send(sample_speech(BLOCK_SAMPLES * 3))
    session.end()
    assert wait_for(lambda: server.streams == 1)


@pytest.mark.parametrize("drop", [drop_when_open, drop_in_use, drop_in_a_circle, drop_after_the_end])
def test_a_session_that_is_dropped_ends(drop: Callable[[FakeAvatarServer], None]) -> None:
    with FakeAvatarServer(delay_s=0.3) as server:
        drop(server)
        assert wait_for(lambda: server.streams == 0)
        assert wait_for(lambda: not any(t.name.startswith("live-avatar") for t in threading.enumerate()))
        quiet = sum(session.keep_alives for session in server.sessions)
        time.sleep(0.2)
        assert sum(session.keep_alives for session in server.sessions) == quiet


@pytest.mark.parametrize("is_collected_elsewhere", [False, True])
@pytest.mark.parametrize("is_fed", [False, True])
def test_an_asynchronous_session_that_is_dropped_ends(is_fed: bool, is_collected_elsewhere: bool) -> None:
    async def chunks() -> AsyncIterator[object]:
        while True:
            await asyncio.sleep(0.02)
            yield np.zeros(320, np.int16)

    async def use(url: str) -> list[AsyncAvatarSession]:
        session = AsyncAvatarSession(url, image=SAMPLE_IMAGE, keep_alive_s=0.05)
        await session.__aenter__()
        if is_fed:
            await anext(session.stream(chunks()))
        return [session]

    async def drop(server: FakeAvatarServer) -> set[str]:
        held = await use(server.url)
        assert await asyncio.to_thread(wait_for, lambda: server.streams == 1)
        if is_collected_elsewhere:
            await asyncio.to_thread(held.clear)
        else:
            held.clear()
        gc.collect()
        for _ in range(6000):
            await asyncio.sleep(0.01)
            left = {task.get_name() for task in asyncio.all_tasks() if "live-avatar" in task.get_name()}
            if not left and server.streams == 0:
                break
        return left

    with FakeAvatarServer() as server:
        assert asyncio.run(drop(server)) == set()
        assert server.streams == 0


@pytest.mark.parametrize("is_async", [False, True])
def test_a_forked_child_leaves_its_parents_session(is_async: bool) -> None:
    """Run in a process of its own: this one has threads that a fork would break."""
    program = f"""
import asyncio, os, sys
from live_avatar_client import AsyncAvatarSession, AvatarSession, SessionClosed
from live_avatar_client.testing import SAMPLE_IMAGE, sample_speech
url = sys.argv[1]
def in_child(call):
    try:
        call()
    except SessionClosed as error:
        print(error, flush=True)
def use():
    with AvatarSession(url, image=SAMPLE_IMAGE) as session:
        child = os.fork()
        if child == 0:
            in_child(lambda: session.send(sample_speech(5)))
            in_child(lambda: next(iter(session)))
            return
        assert os.waitpid(child, 0)[1] == 0
        session.send(sample_speech(5)); session.end()
        print(sum(map(len, session)), flush=True)
async def use_async():
    async with AsyncAvatarSession(url, image=SAMPLE_IMAGE) as session:
        child = os.fork()
        if child == 0:
            try:
                await session.send(sample_speech(5))
            except SessionClosed as error:
                print(error, flush=True)
            await session.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        await session.send(sample_speech(5)); await session.end()
        print(sum([len(block) async for block in session]), flush=True)
asyncio.run(use_async()) if {is_async} else use()
"""
    with FakeAvatarServer() as server:
        done = subprocess.run([sys.executable, "-c", program, server.url], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *refused, frames = done.stdout.splitlines()
    assert frames == "1"
    assert len(refused) == (1 if is_async else 2)
    assert all(
        re.match(r"the session belongs to process \d+, and this is process \d+, forked from", x) for x in refused
    )


@both_ways
@pytest.mark.parametrize(
    ("chunks", "kind"),
    [
        (sample_speech(BLOCK_SAMPLES), "ndarray"),
        (sample_speech(BLOCK_SAMPLES).tobytes(), "bytes"),
        ("speech.wav", "str"),
        (np.int16(3), "int16"),
        (None, "NoneType"),
        (sample_speech, "function"),
    ],
)
def test_a_chunk_in_place_of_chunks(play: Play, chunks: Any, kind: str) -> None:
    with FakeAvatarServer() as server, pytest.raises(InvalidInput) as caught:
        play(server.url, chunks)
    said = f"stream() got a {kind}; pass a list or another iterable of chunks, such as [chunk]"
    assert str(caught.value) == said


@both_ways
def test_rows_are_chunks(play: Play) -> None:
    with FakeAvatarServer() as server:
        assert sum(map(len, play(server.url, sample_speech(BLOCK_SAMPLES).reshape(12, -1)))) == 12
