"""A caller's stream without a server: what it may make the gateway keep, and the order of its answers."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from live_avatar.arrays import Array
from live_avatar.errors import InputError
from live_avatar.gateway import server
from live_avatar.gateway.admission import Admission
from live_avatar.gateway.audit import AuditLog
from live_avatar.gateway.avatars import Avatars, AvatarSource
from live_avatar.gateway.context import Caller, SessionContext
from live_avatar.gateway.frames import FramePool
from live_avatar.gateway.metrics import GatewayMeter
from live_avatar.gateway.pipe import Closed
from live_avatar.gateway.requests import error_response
from live_avatar.gateway.streams import CallerStream
from live_avatar.gateway.window import PipeWindow
from live_avatar.serving.control import Control
from live_avatar.serving.gateway_settings import Limits
from live_avatar.serving.options import OptionsReader
from live_avatar.serving.provenance import ProvenanceWriter
from live_avatar.serving.served import Served
from live_avatar_client.protocol import BLOCK_SAMPLES

LIMIT_S = 120.0
LARGE = 1024
"""Height and width of frames that come through shared memory."""


class FakeStream:
    """Answers a request when the test says so."""

    def __init__(self, at_once: bool) -> None:
        self.answers: asyncio.Queue[bytes | Closed] = asyncio.Queue()
        self.sent: list[Any] = []
        self._at_once = at_once
        self._over = asyncio.Event()
        self._acts: list[Callable[[], None]] = []

    def send(self, request: Any) -> None:
        self.sent.append(request)
        if self._at_once:
            self.answer(request)

    def answer(self, request: Any) -> None:
        answer = service_pb2.ModelStreamInferResponse()
        answer.infer_response.id = request.id
        self.answers.put_nowait(answer.SerializeToString())

    def finish(self) -> None:
        self._over.set()
        for act in self._acts:
            act()

    def abandon(self) -> None:
        self._over.set()

    def on_closed(self, act: Callable[[], None]) -> None:
        self._acts.append(act)
        if self._over.is_set():
            act()

    async def wait_closed(self) -> None:
        await self._over.wait()


@dataclass
class FakePipe:
    at_once: bool = True
    streams: list[FakeStream] = field(default_factory=list)

    def open(self) -> FakeStream:
        self.streams.append(FakeStream(self.at_once))
        return self.streams[-1]


async def make_avatar(source: AvatarSource) -> tuple[Array, Array, Array]:
    return np.zeros(1, np.float32), np.zeros(1, np.float32), np.zeros((0, 1), np.float32)


def context(at_once: bool = True, size: int = 64, **changes: Any) -> tuple[SessionContext, FakePipe]:
    values: dict[str, Any] = {"max_sessions": 3, "idle_s": 30.0, "pipe_blocks": 4, "lone_blocks": 6}
    limits = Limits(**(values | changes))
    pipe = FakePipe(at_once)
    made = SessionContext(
        pipe=pipe,  # type: ignore[arg-type]
        window=PipeWindow(limits),
        admission=Admission(limits),
        avatars=Avatars(make_avatar, limits),
        options=OptionsReader(size, size),
        meter=GatewayMeter(Served("1", "tiny", "f", "cpu", 3)),
        audit=AuditLog(as_json=False, with_hashes=False),
        provenance=ProvenanceWriter(Served("1", "tiny", "f", "cpu", 3)),
        speakers=1,
        limits=limits,
        control=Control(None),
        frames=FramePool(f"live-avatar-test-{uuid.uuid4().hex}", 1, size, size),
    )
    made.admission.is_pipe_ready = True
    return made, pipe


def request(name: str, samples: int = BLOCK_SAMPLES, picture: bytes | None = None, **parameters: Any) -> Any:
    message = service_pb2.ModelInferRequest(model_name="live_avatar", id=name)
    for key, value in ({"sequence_id": 5} | parameters).items():
        setattr(message.parameters[key], "bool_param" if isinstance(value, bool) else "int64_param", value)
    message.inputs.add(name="AUDIO", datatype="INT16", shape=[samples])
    message.raw_input_contents.append(bytes(2 * samples))
    if picture is not None:
        message.inputs.add(name="REFERENCE_IMAGE", datatype="UINT8", shape=[len(picture)])
        message.raw_input_contents.append(picture)
    return message


START = request("start", picture=b"picture", sequence_start=True)


class FakeCaller:
    """Sends messages to a stream, and collects the answers or reads none."""

    def __init__(self, made: SessionContext, reads: bool = True, caller: Caller | None = None) -> None:
        self.answers: list[tuple[str, str]] = []
        self.taken = 0
        self._reads = reads
        self._messages: asyncio.Queue[Any] = asyncio.Queue()
        self.stream = CallerStream(caller or Caller("a", "key a", "peer"), made, self._write)
        self._task = asyncio.create_task(self.stream.serve(self._iterate()))

    async def _write(self, answer: bytes) -> None:
        if not self._reads:
            await asyncio.Event().wait()
        message = service_pb2.ModelStreamInferResponse.FromString(answer)
        self.answers.append((message.infer_response.id, message.error_message))

    async def _iterate(self) -> AsyncIterator[Any]:
        while (message := await self._messages.get()) is not None:
            self.taken += 1
            yield message

    def send(self, *messages: Any) -> None:
        for message in messages:
            self._messages.put_nowait(message)

    async def close(self) -> list[str]:
        """The ids of all answers."""
        self.send(None)
        await asyncio.wait_for(self._task, LIMIT_S)
        await settle()
        return [name for name, _ in self.answers]

    async def vanish(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


async def settle() -> None:
    for _ in range(200):
        await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    "message",
    [
        request("bad", samples=3),
        request("start", picture=bytes(1000), sequence_start=True),
        request("keep-alive", samples=0),
        request("picture", picture=bytes(1000)),
    ],
    ids=lambda message: message.id,
)
def test_nothing_piles_up_for_a_caller_that_reads_no_answers(message: Any):
    async def main() -> None:
        made, _ = context()
        caller = FakeCaller(made, reads=False)
        caller.send(START, *[message] * 500)
        await settle()
        assert caller.taken < 30
        await caller.vanish()

    run(main())


def test_a_refusal_comes_at_its_turn():
    async def main() -> None:
        made, pipe = context(at_once=False)
        caller = FakeCaller(made)
        caller.send(START, request("1"), request("bad", samples=3), request("2"), request("end", 0, sequence_end=True))
        await settle()
        assert caller.answers == []
        for sent in pipe.streams[0].sent:
            pipe.streams[0].answer(sent)
        assert await caller.close() == ["start", "1", "bad", "2", "end"]

    run(main())


def test_a_request_that_cannot_be_read_is_answered_after_the_end():
    async def main() -> None:
        made, _ = context()
        caller = FakeCaller(made)
        caller.send(START, request("end", 0, sequence_end=True), request("bad", samples=3))
        assert await caller.close() == ["start", "end", "bad"]
        assert made.admission.live == 0

    run(main())


def test_a_block_that_comes_with_the_start_goes_after_it_by_itself():
    async def main() -> None:
        made, pipe = context(at_once=False)
        caller = FakeCaller(made)
        caller.send(START)
        await settle()
        start, block = pipe.streams[0].sent
        flags = [one.parameters["sequence_start"].bool_param for one in (start, block)]
        sizes = [len(one.raw_input_contents[0]) for one in (start, block)]
        assert (flags, sizes) == ([True, False], [0, 2 * BLOCK_SAMPLES])
        pipe.streams[0].answer(start)
        await settle()
        assert caller.answers == [], "the caller asked once"
        pipe.streams[0].answer(block)
        assert await caller.close() == ["start"]
        assert made.live == set()

    run(main())


def test_a_block_is_followed_by_a_request_for_each_further_response():
    async def main() -> None:
        made, pipe = context(at_once=False, size=LARGE)
        made.frames.is_registered = True
        try:
            caller = FakeCaller(made)
            caller.send(request("start", 0, b"picture", sequence_start=True, frames_per_response=4))
            caller.send(request("block", sequence_end=True))
            await settle()
            start, *parts = pipe.streams[0].sent
            assert start.parameters["frames_per_response"].int64_param == 4
            assert [one.id for one in parts] == ["block"] * 3
            assert [len(one.raw_input_contents[0]) for one in parts] == [2 * BLOCK_SAMPLES, 0, 0]
            assert [one.parameters["sequence_end"].bool_param for one in parts] == [False, False, True]
            outputs = [output.parameters for one in parts for output in one.outputs]
            places = [parameters for parameters in outputs if "shared_memory_offset" in parameters]
            assert [place["shared_memory_byte_size"].int64_param for place in places] == [4 * LARGE * LARGE * 3] * 3
            offsets = [place["shared_memory_offset"].int64_param for place in places]
            assert offsets == [0, 4 * LARGE * LARGE * 3, 8 * LARGE * LARGE * 3]
            for one in (start, parts[0]):
                pipe.streams[0].answer(one)
            await settle()
            assert [name for name, _ in caller.answers] == ["start", "block"], "the first frames wait for no others"
            assert made.window.inside() == 1
            assert made.frames.take() is None
            for one in parts[1:]:
                pipe.streams[0].answer(one)
            assert await caller.close() == ["start", "block", "block", "block"]
            assert made.frames.take() is not None
            assert (made.admission.live, made.window.inside()) == (0, 0)
        finally:
            made.frames.close()

    run(main())


def test_an_error_is_the_last_response_to_a_block():
    async def main() -> None:
        made, pipe = context(at_once=False)
        caller = FakeCaller(made)
        caller.send(request("start", 0, b"picture", sequence_start=True, frames_per_response=4))
        caller.send(request("block"), request("next"))
        await settle()
        stream = pipe.streams[0]
        for one in stream.sent[:2]:
            stream.answer(one)
        stream.answers.put_nowait(error_response("block", "[FAILED] the decoder is broken"))
        assert await caller.close() == ["start", "block", "block", "next"]
        told = [text for _, text in caller.answers]
        assert told[:2] == ["", ""]
        assert all("the decoder is broken" in text for text in told[2:])
        assert made.live == set()

    run(main())


def test_a_session_that_fails_while_its_first_block_waits_gives_everything_back():
    async def main() -> None:
        made, pipe = context(lone_blocks=0, size=LARGE)
        made.frames.is_registered = True
        try:
            caller = FakeCaller(made)
            caller.send(START)
            await settle()
            [session] = made.live
            session.fail(InputError("it has lasted too long"))
            assert await caller.close() == ["start"]
            assert "it has lasted too long" in caller.answers[0][1]
            start, end = pipe.streams[0].sent
            assert start.parameters["sequence_start"].bool_param
            assert not start.raw_input_contents[0], "the block waits for its turn"
            assert end.parameters["sequence_end"].bool_param
            assert made.frames.take() is not None
            assert (made.admission.live, made.window.inside()) == (0, 0)
        finally:
            made.frames.close()
        assert not list(Path("/dev/shm").glob("live-avatar-test-*"))

    run(main())


def test_a_session_that_lasts_too_long_ends_with_its_own_reason():
    async def main() -> None:
        made, _ = context(session_s=0.0)
        caller = FakeCaller(made)
        caller.send(START)
        await settle()
        [session] = made.live
        assert session.is_too_long(time.monotonic() + 1.0)
        session.end_too_long()
        caller.send(request("more"))
        await caller.close()
        assert "has lasted 0 s, the longest that this server allows" in caller.answers[-1][1]
        assert 'live_avatar_sessions_ended_total{reason="too_long"} 1.0' in made.meter.text()

    run(main())


def test_an_error_in_the_gateway_is_told_and_ends_the_session_alone(monkeypatch: pytest.MonkeyPatch):
    async def main() -> None:
        made, _ = context()
        caller = FakeCaller(made)
        caller.send(START)
        await settle()

        async def broken(session: object) -> None:
            raise RuntimeError("broken")

        monkeypatch.setattr(made.window, "enter", broken)
        caller.send(*(request(f"{n}") for n in range(20)), request("end", 0, sequence_end=True))
        assert await caller.close() == ["start", *map(str, range(20)), "end"]
        assert all("broken" in error for _, error in caller.answers[1:])
        assert made.admission.live == 0

    run(main())


def test_a_stream_starts_no_session_once_its_key_was_removed():
    async def main() -> None:
        made, _ = context()
        allowed = [True]
        caller = FakeCaller(made, caller=Caller("a", "key a", "peer", lambda: allowed[0]))
        caller.send(START)
        await settle()
        allowed[0] = False
        caller.send(request("1"), request("other", picture=b"picture", sequence_start=True, sequence_id=6))
        await caller.close()
        errors = dict(caller.answers)
        assert (errors["start"], errors["1"]) == ("", "")
        assert "the key of this stream is no longer one of the server's" in errors["other"]

    run(main())


def test_what_the_gateway_does_now_and_then_goes_on_after_an_error():
    async def main() -> None:
        calls = 0

        def act() -> None:
            nonlocal calls
            calls += 1
            raise RuntimeError("broken")

        task = asyncio.create_task(server._repeat(act, 0.001))
        await settle()
        task.cancel()
        assert calls > 5

    run(main())


def with_masks(message: Any, *masks: bytes) -> Any:
    made = service_pb2.ModelInferRequest()
    made.CopyFrom(message)
    made.inputs.add(name="SPEAKER_MASKS", datatype="BYTES", shape=[len(masks)])
    made.raw_input_contents.append(b"".join(len(mask).to_bytes(4, "little") + mask for mask in masks))
    return made


def test_one_speaker_has_no_masks_and_later_requests_have_none():
    async def main() -> None:
        made, pipe = context()
        caller = FakeCaller(made)
        caller.send(with_masks(START, b"0,0,5,5"))
        await settle()
        assert pipe.streams == []
        caller.send(START, with_masks(request("1"), b"0,0,5,5"))
        await caller.close()
        (_, refused), (_, started), (_, late) = caller.answers
        assert "[INVALID_ARGUMENT] 1 mask came for artifacts of one speaker; leave the masks out" in refused
        assert started == ""
        assert "SPEAKER_MASKS came after the first request; start a new session to change it" in late

    run(main())


def test_the_weights_of_several_speakers_go_to_triton_with_the_start():
    async def make(source: AvatarSource) -> tuple[Array, Array, Array]:
        weights = np.arange(len(source.masks) * 3, dtype=np.float32).reshape(-1, 3)
        return np.zeros(1, np.float32), np.zeros(1, np.float32), weights

    async def main() -> None:
        made, pipe = context()
        made.speakers, made.avatars = 2, Avatars(make, made.limits)
        caller = FakeCaller(made)
        start = request("start", 2 * BLOCK_SAMPLES, picture=b"picture", sequence_start=True)
        caller.send(start)
        await settle()
        caller.send(with_masks(start, b"0,0,5,5", b"0,0,5,5"), request("1", 2 * BLOCK_SAMPLES))
        await caller.close()
        assert "0 masks came for artifacts of 2 speakers" in caller.answers[0][1]
        assert [text for _, text in caller.answers[1:]] == ["", ""]
        first, *others, _ = pipe.streams[0].sent
        names = [tensor.name for tensor in first.inputs]
        assert list(first.inputs[names.index("SPEAKER_WEIGHTS")].shape) == [2, 3]
        assert [[tensor.name for tensor in one.inputs] for one in others] == [["AUDIO", "PROVENANCE_IN"], ["AUDIO"]]

    run(main())
