"""A server that lies: whatever it says, the session ends with one printable sentence, in time and within memory."""

import asyncio
import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from live_avatar_client import (
    AsyncAvatarSession,
    AvatarError,
    AvatarSession,
    ConnectionLost,
    ServerError,
    ServerIncompatible,
    base,
)
from live_avatar_client.media import Mp4Writer, provenance_metadata
from live_avatar_client.protocol import (
    BLOCK_SAMPLES,
    FIRST_FRAME,
    FRAMES,
    JPEG_FRAMES,
    JPEG_SIZES,
    MAX_JSON_BYTES,
    MAX_LOOKAHEAD_FRAMES,
    OUTPUTS,
    PROVENANCE,
    TensorSpec,
)
from live_avatar_client.testing import SAMPLE_IMAGE, FakeAvatarServer, sample_speech
from live_avatar_client.text import printable

ANSWER_S = 60.0
"""A client that waits for the right answer instead would take as long."""
Change = Callable[[Any, bool], Any]
"""What a liar makes of an answer, given whether it is the answer to START."""


class Liar(FakeAvatarServer):
    """A server that changes its answers before it sends them."""

    def __init__(self, change: Change) -> None:
        super().__init__(height=8, width=8)
        self._change = change
        self.requests = 0

    def answers(self, request: Any) -> list[Any]:
        self.requests += 1
        is_start = request.parameters["sequence_start"].bool_param
        return [self._change(answer, is_start) for answer in super().answers(request)]


def play_sync(url: str, **options: Any) -> int:
    with AvatarSession(url, image=SAMPLE_IMAGE, answer_timeout_s=ANSWER_S, **options) as session:
        return sum(len(block) for block in session.stream([sample_speech(BLOCK_SAMPLES * 3)]))


def play_async(url: str, **options: Any) -> int:
    async def play() -> int:
        async with AsyncAvatarSession(url, image=SAMPLE_IMAGE, answer_timeout_s=ANSWER_S, **options) as session:
            return sum([len(block) async for block in session.stream([sample_speech(BLOCK_SAMPLES * 3)])])

    return asyncio.run(play())


both_ways = pytest.mark.parametrize("play", [play_sync, play_async])


def put(message: Any, spec: TensorSpec, content: bytes, shape: list[int]) -> None:
    number = OUTPUTS.index(spec)
    message.infer_response.outputs[number].shape[:] = shape
    message.infer_response.raw_output_contents[number] = content


def tensor(spec: TensorSpec, content: bytes, *shape: int, at_start: bool = False) -> Change:
    """Answer with this content of a tensor, once per block or at the start."""

    def change(message: Any, is_start: bool) -> Any:
        if is_start == at_start:
            put(message, spec, content, list(shape))
        return message

    return change


def provenance(text: bytes) -> Change:
    return tensor(PROVENANCE, text, len(text), at_start=True)


def int64(*values: int) -> bytes:
    return np.array(values, np.int64).tobytes()


def pixels(frames: int, height: int, width: int) -> Change:
    return tensor(FRAMES, bytes(frames * height * width * 3), frames, height, width, 3)


def growing(message: Any, is_start: bool, size: list[int] = [8]) -> Any:  # noqa: B006 - it remembers
    if not is_start:
        size[0] += 1
        put(message, FRAMES, bytes(12 * size[0] * 8 * 3), [12, size[0], 8, 3])
    return message


def empty(message: Any, is_start: bool) -> Any:
    return service_pb2.ModelStreamInferResponse()


DEEP = b'{"a":' + b"[" * 30_000 + b"]" * 30_000 + b"}"
LIES: dict[str, tuple[Change, str]] = {
    "deep provenance": (provenance(DEEP), "PROVENANCE is no JSON: maximum recursion depth"),
    "deeper provenance": (
        provenance(b"[" * 100_000),
        f"PROVENANCE has 100000 bytes, expected at most {MAX_JSON_BYTES}",
    ),
    "provenance that is no number": (provenance(b'{"seed": NaN}'), "PROVENANCE is no JSON: Out of range float"),
    "provenance that is no text": (provenance(rb'{"seed": "\ud800"}'), "PROVENANCE is no JSON: 'utf-8' codec"),
    "provenance of many digits": (provenance(b'{"seed": ' + b"9" * 60_000 + b"}"), "PROVENANCE is no JSON: Exceeds"),
    "a far look-ahead": (
        tensor(FIRST_FRAME, int64(-(10**12)), 1),
        f"FIRST_FRAME -1000000000000, expected {-MAX_LOOKAHEAD_FRAMES} to 0",
    ),
    "the farthest": (tensor(FIRST_FRAME, int64(-(2**63)), 1), "FIRST_FRAME -9223372036854775808, expected -750 to 0"),
    "a frame to come": (tensor(FIRST_FRAME, int64(12), 1), "FIRST_FRAME 12, expected -750 to 0"),
    "the same frames again": (tensor(FIRST_FRAME, int64(0), 1), "FIRST_FRAME 0, expected 12"),
    "no pixels": (pixels(12, 0, 0), "frames of 0x0 pixels, expected at least 1x1"),
    "no columns": (pixels(12, 8, 0), "frames of 0x8 pixels, expected at least 1x1"),
    "too many frames": (pixels(13, 8, 8), "answered a block with 13 raw frames, expected 12"),
    "growing frames": (growing, r"frames of 8x\d+ pixels, expected 8x\d+"),
    "a size below 0": (tensor(FRAMES, bytes(2304), -1, 8, 8, 3), "no readable FRAMES"),
    "a size beyond all": (tensor(FRAMES, b"", 2**62, 2**62, 8, 3), "no readable FRAMES"),
    "none of much": (tensor(FRAMES, b"", 12, 2**62, 0, 3), "no readable FRAMES|frames of 0x"),
    "many sizes": (tensor(JPEG_SIZES, bytes(8_000_000), 1_000_000), "JPEG_SIZES has 1000000 sizes, expected at most"),
    "an empty answer": (empty, "no readable FRAMES"),
}


@both_ways
@pytest.mark.parametrize("lie", LIES)
def test_a_lie_ends_the_session(play: Callable[..., int], lie: str) -> None:
    change, message = LIES[lie]
    started_s = time.monotonic()
    with Liar(change) as server, pytest.raises(ServerIncompatible, match=message) as caught:
        play(server.url)
    assert time.monotonic() - started_s < ANSWER_S
    assert server.requests <= 8
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([-5, 5], "JPEG_SIZES add up to 0 of 12 bytes"),
        ([2**63 - 1] * 2, "JPEG_SIZES add up to 18446744073709551614 of 12 bytes"),
        ([12, *[0] * 11], "JPEG_SIZES add up to 12 of 12 bytes"),
        ([1] * 13, "JPEG_SIZES has 13 sizes, expected at most 12"),
    ],
)
def test_sizes_that_lie(sizes: list[int], message: str) -> None:
    def change(answer: Any, is_start: bool) -> Any:
        put(answer, JPEG_FRAMES, bytes(12), [12])
        put(answer, JPEG_SIZES, int64(*sizes), [len(sizes)])
        return answer

    with Liar(change) as server, pytest.raises(ServerIncompatible, match=message):
        play_sync(server.url, frame_format="jpeg")


def error(text: str) -> Change:
    return lambda message, is_start: service_pb2.ModelStreamInferResponse(error_message=text)


@both_ways
@pytest.mark.parametrize("code", ["[UNAVAILABLE] ", "[FAILED] ", ""])
def test_an_error_is_one_printable_line(play: Callable[..., int], code: str) -> None:
    text = "\x1b]0;owned\x07\x1b[2J\x9b31mpassword: \r\nError: \u202eall is well"
    with Liar(error(code + text)) as server, pytest.raises(ServerError) as caught:
        play(server.url)
    said = str(caught.value)
    assert said.isprintable()
    assert said.endswith(r": \x1b]0;owned\x07\x1b[2J\x9b31mpassword: \r\nError: \u202eall is well")


def test_a_long_error_is_cut() -> None:
    with Liar(error("[FAILED] " + "x" * 20_000_000)) as server, pytest.raises(ServerError) as caught:
        play_sync(server.url)
    assert 500 < len(str(caught.value)) < 1_200


@both_ways
def test_an_answer_beyond_the_limit(play: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert dict(base.CHANNEL_OPTIONS)["grpc.max_receive_message_length"] < 300 * 2**20
    small = (("grpc.max_receive_message_length", 100_000),)
    with Liar(pixels(12, 200, 200)) as server:
        monkeypatch.setattr(base, "CHANNEL_OPTIONS", small)
        # grpc's asyncio API may lose the reason of a broken stream.
        with pytest.raises(ConnectionLost, match=r"eceived message larger than max|Internal error from Core"):
            play(server.url)


def test_answers_that_nobody_asked_for_are_not_kept() -> None:
    with FakeAvatarServer() as server, AvatarSession(server.url, image=SAMPLE_IMAGE) as session:
        answer = server.answers(service_pb2.ModelInferRequest())[0]
        for _ in range(100):
            session._receive(answer)
        tracemalloc.start()
        for _ in range(1_000):
            session._receive(answer)
        kept = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, f"{Path(base.__file__).parent}/*")])
        tracemalloc.stop()
        assert sum(trace.size for trace in kept.traces) < 100_000
        with pytest.raises(AvatarError):
            next(iter(session))


def test_provenance_goes_into_a_file_as_text(tmp_path: Any) -> None:
    said = {"generator": "\x1b[31m\u0000x" * 1_000, "version": {"a": [1]}}
    metadata = provenance_metadata(said)
    assert metadata["comment"].isprintable()
    assert len(metadata["comment"]) < 2_200
    assert json.loads(metadata["description"]) == said
    with Mp4Writer(tmp_path / "a.mp4", 32, 32, metadata=metadata) as video:
        video.write(np.zeros((2, 32, 32, 3), np.uint8))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain, naïve 生成 😀", "plain, naïve 生成 😀"),
        ("a\tb\r\nc\x7f\x85", r"a\tb\r\nc\x7f\x85"),
        ("\u2028\u202e\ufeff", r"\u2028\u202e\ufeff"),
        ("\ud800\U000e0001", r"\ud800\U000e0001"),
        ("x" * 11, "xxxxxxx..."),
    ],
)
def test_printable_text(text: str, expected: str) -> None:
    assert printable(text, max_chars=40 if "x" not in text else 10) == expected
