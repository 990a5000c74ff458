"""Rubbish of every kind against the real server: an answer to everything, no crash, no leak, and others are served.

Requests are built below the client libraries, so that anything can be sent: tensors that lie about themselves, ids,
flags and parameters of any type, broken pictures, messages that are no protobuf. Hypothesis draws them from fixed
seeds.
"""

from __future__ import annotations

import io
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from tritonclient.grpc import service_pb2 as pb

from live_avatar.arrays import Array
from live_avatar.assets import PORTRAIT
from live_avatar.gateway.server import MAX_MESSAGE_BYTES
from live_avatar.serving.server import TritonServer
from live_avatar_client.protocol import BLOCK_SAMPLES, MODEL_NAME, ErrorCode, parse_error
from perf.growth import Memory
from tests.serving.raw import header_of_a_huge_png
from tests.serving.support import neighbour, watched

MOST_ANSWERS = 3  # to one request
LIMIT_S = 60.0  # for the answers to all requests of one stream
AT_ONCE_S = 30.0
MIB = 2**20
PRIVATE_LIMIT, SHARED_LIMIT = 24.0, 1.0
"""MiB by which a process, and the shared memory of all, may grow after the warm-up."""
SERVICE = "/inference.GRPCInferenceService/"

CALL_CODES = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)
"""How a call may end: its message is no request, names no model, or is too large, or the call answers no sessions."""


# ---- pictures


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(mode: str, side: int = 64) -> Image.Image:
    values = np.random.default_rng(1).integers(0, 256, (side, side, 4), dtype=np.uint8)
    return Image.fromarray(values, "RGBA").convert(mode)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(kind: bytes, data: bytes) -> bytes:
    """A small PNG with a chunk of that kind after its header."""
    png = encoded(noise("RGB"), "PNG")
    return png[:33] + chunk(kind, data) + png[33:]


@cache
def zeros() -> bytes:
    """50 MiB, compressed."""
    return zlib.compress(bytes(50 * MIB))


@cache
def good_pictures() -> tuple[bytes, ...]:
    """Odd ones that a picture may be: colour spaces, depths, chunks, and as many pixels as are allowed."""
    grey16 = Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16)
    turned = Image.Exif()
    turned[0x0112] = 6
    return (
        PORTRAIT.read_bytes(),
        encoded(noise("CMYK"), "JPEG"),
        encoded(grey16, "PNG"),
        encoded(noise("RGBA"), "WEBP"),
        encoded(noise("P"), "PNG", transparency=3),
        encoded(noise("RGB"), "JPEG", exif=turned),
        encoded(Image.new("1", (8000, 8000)), "PNG"),
        png_with(b"IDAT", zeros()),  # read no further than its size says
        png_with(b"zTXt", b"a\0\0" + zeros()),  # not read
        png_with(b"iCCP", b"a\0\0" + zeros()),
    )


@cache
def bad_pictures() -> tuple[bytes, ...]:
    png, jpeg, webp = (encoded(noise("RGB"), kind) for kind in ("PNG", "JPEG", "WEBP"))
    frame_header = jpeg.index(b"\xff\xc0") + 5
    return (
        b"",
        b"\x89PNG\r\n\x1a\n",
        *(data[: len(data) * part // 4] for data in (png, jpeg, webp) for part in (1, 2, 3)),
        *(encoded(noise("P"), kind) for kind in ("GIF", "BMP", "TIFF", "ICO")),
        encoded(Image.new("RGB", (1, 1)), "PNG"),
        encoded(Image.new("RGB", (1, 20_000)), "JPEG"),
        *(header_of_a_huge_png(side) for side in (0, 8_001, 50_000, 2**31 - 1)),
        jpeg[:frame_header] + b"\xff\xff\xff\xff" + jpeg[frame_header + 4 :],  # 65535 x 65535
        encoded(noise("RGBA"), "WEBP", save_all=True, append_images=[noise("L").convert("RGBA")]),
        png_with(b"IHDR", b"\xff" * 13),
        b"<svg xmlns='http://www.w3.org/2000/svg' width='9e9'/>",
        bytes(32 * MIB + 1),
    )


# ---- requests


@dataclass(frozen=True)
class U64:
    """A parameter in the field for unsigned integers."""

    value: int


@dataclass(frozen=True)
class Tensor:
    """One input: what it says of itself, and its bytes; `typed` are contents beside the raw ones."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes | None = field(repr=False)
    typed: tuple[tuple[str, tuple[Any, ...]], ...] = ()


@dataclass(frozen=True)
class Request:
    tensors: tuple[Tensor, ...]
    parameters: tuple[tuple[str, Any], ...]
    outputs: tuple[tuple[str, str | None, Any], ...] = ()
    id: str = ""
    version: str = ""
    surplus: bytes | None = None
    damage: tuple[str, Any] = ("none", None)

    def serialised(self) -> bytes:
        message = pb.ModelInferRequest(model_name=MODEL_NAME, model_version=self.version, id=self.id)
        for tensor in self.tensors:
            added = message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
            for name, values in tensor.typed:
                getattr(added.contents, name).extend(values)
        message.raw_input_contents.extend(tensor.data for tensor in self.tensors if tensor.data is not None)
        if self.surplus is not None:
            message.raw_input_contents.append(self.surplus)
        for name, parameter, value in self.outputs:
            output = message.outputs.add(name=name)
            if parameter is not None:
                put(output.parameters[parameter], value)
        for name, value in self.parameters:
            put(message.parameters[name], value)
        return damaged(message.SerializeToString(), *self.damage)


def put(parameter: pb.InferParameter, value: Any) -> None:
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    if isinstance(value, U64):
        parameter.uint64_param = value.value
    else:
        setattr(parameter, kinds[type(value)], value)


def damaged(data: bytes, how: str, where: Any) -> bytes:
    match how:
        case "cut":
            return data[: int(where * len(data))]
        case "flip":
            at = int(where * (len(data) - 1))
            return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]
        case "text":  # a name that is not UTF-8
            return data.replace(b"AUDIO", b"AUD\xff\xfe", 1)
        case "noise":
            return bytes(where)
    return data


def packed(*texts: bytes) -> bytes:
    """The raw contents of a tensor of strings."""
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def mostly(usual: st.SearchStrategy[Any], odd: st.SearchStrategy[Any], of: int = 8) -> st.SearchStrategy[Any]:
    """The odd one once in `of` times."""
    return st.integers(1, of).flatmap(lambda drawn: odd if drawn == of else usual)


AUDIO = st.just(Tensor("AUDIO", "INT16", (BLOCK_SAMPLES,), bytes(2 * BLOCK_SAMPLES)))
KEEP_ALIVE = st.just(Tensor("AUDIO", "INT16", (0,), b""))
DATATYPES = ("INT16", "UINT16", "INT8", "FP16", "FP32", "BOOL", "BYTES", "INT64", "FLOAT", "")
EXTENTS = (0, 1, -1, 2, 639, BLOCK_SAMPLES, BLOCK_SAMPLES + 1, 2**31, 2**62, 2**63 - 1, -(2**63))
CONTENTS = st.sampled_from(
    [("int_contents", (1, 2)), ("fp32_contents", (0.5,)), ("bytes_contents", (b"x",)), ("bool_contents", (True,))]
)


def lying(name: str) -> st.SearchStrategy[Tensor]:
    """An input of that name with any type, any shape and any bytes."""
    return st.builds(
        Tensor,
        st.just(name),
        st.sampled_from(DATATYPES),
        st.lists(st.sampled_from(EXTENTS), max_size=3).map(tuple),
        st.one_of(st.none(), st.binary(max_size=40), st.just(bytes(2 * BLOCK_SAMPLES)), st.just(bytes(MIB))),
        st.lists(CONTENTS, max_size=1).map(tuple),
    )


def wrong_length(size: int) -> Tensor:
    return Tensor("AUDIO", "INT16", (size,), bytes(2 * size))


def picture(data: bytes) -> Tensor:
    return Tensor("REFERENCE_IMAGE", "UINT8", (len(data),), data)


def prompt(data: bytes) -> Tensor:
    return Tensor("PROMPT", "BYTES", (1,), data)


ODD_AUDIO = st.one_of(
    lying("AUDIO"), st.sampled_from((1, 639, BLOCK_SAMPLES - 1, BLOCK_SAMPLES + 1, 200_000)).map(wrong_length)
)
GOOD_PROMPTS = tuple(map(packed, (b"hello", b"", b"a\0b\0", "你好 👋 \u202e".encode(), b"x" * 2000)))
BAD_PROMPTS = (
    *map(packed, (b"\xff\xfe", b"a\xc0\x80", b"\xed\xa0\x80", b"x" * 2001, b"x" * 100_000)),
    *(b"", b"\1", b"\xff\xff\xff\xff", b"\5\0\0\0ab", packed(b"a", b"b")),
)
# Pictures and prompts that are right are few, so that the server remembers the avatars and the test is about rubbish.
AVATARS = [(good, GOOD_PROMPTS[0]) for good in good_pictures()]
AVATARS += [(good_pictures()[0], good) for good in GOOD_PROMPTS]
BAD_PICTURES = st.one_of(st.sampled_from(bad_pictures()), st.binary(max_size=64)).map(picture)
GOOD_AVATAR = st.sampled_from(AVATARS).map(lambda pair: (picture(pair[0]), prompt(pair[1])))
BAD_AVATAR = st.one_of(
    st.tuples(BAD_PICTURES),
    st.tuples(BAD_PICTURES, st.sampled_from(GOOD_PROMPTS).map(prompt)),
    st.tuples(st.just(picture(good_pictures()[0])), st.sampled_from(BAD_PROMPTS).map(prompt)),
    st.tuples(lying("REFERENCE_IMAGE")),
    st.tuples(lying("PROMPT")),
    st.tuples(st.sampled_from(BAD_PROMPTS).map(prompt)),
    st.tuples(lying("SURPLUS")),
    st.tuples(KEEP_ALIVE),
)

IDS = mostly(
    st.integers(1, 5),
    st.sampled_from(
        [0, -1, 2**63 - 1, -(2**63), U64(2**64 - 1), U64(7), "", "abc", "7", "é\0", "x" * 129, True, 2.5, None]
    ),
    of=5,
)
ANYTHING = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.booleans(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=80),
    st.sampled_from([U64(0), U64(2**64 - 1), "x" * 100_000, "AI-generated", "A\n", "raw", "jpeg"]),
)
USUAL = {
    "seed": st.sampled_from([0, 3, 2**63 - 1]),
    "frame_format": st.sampled_from(["raw", "jpeg"]),
    "jpeg_quality": st.sampled_from([1, 90, 95]),
    "label": st.sampled_from(["", "AI-generated"]),
    "frames_per_response": st.sampled_from([4, 12]),
    "end_reason": st.sampled_from(["completed", "abandoned", "failed"]),
}
ODD_NAMES = st.one_of(
    st.sampled_from(
        ["token", "priority", "timeout", "binary_data_output", "triton_enable_empty_final_response", 'a"b\\\n', ""]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
)
OUTPUTS = st.lists(
    st.tuples(
        st.sampled_from(["FRAMES", "JPEG_FRAMES", "JPEG_SIZES", "FIRST_FRAME", "PROVENANCE", "BLOCK", ""]),
        st.sampled_from([None, None, "classification", "shared_memory_region", "binary_data"]),
        ANYTHING,
    ),
    min_size=1,
    max_size=3,
).map(tuple)
DAMAGES = st.one_of(
    st.tuples(st.sampled_from(["cut", "flip"]), st.floats(0, 1)),
    st.just(("text", None)),
    st.tuples(st.just("noise"), st.binary(max_size=200)),
)


FAULTS = ("audio", "avatar", "tensors", "flags", "parameters", "outputs", "envelope", "damage")
START_FAULTS = ("avatar",) * 6 + ("parameters",) * 3
SAFE_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@st.composite
def parameters(draw: st.DrawFn, session: Any, start: bool, faults: Sequence[str]) -> tuple[tuple[str, Any], ...]:
    chosen: dict[str, Any] = {} if session is None else {"sequence_id": session}
    chosen["sequence_start"] = draw(ANYTHING) if "flags" in faults else start
    chosen["sequence_end"] = draw(ANYTHING if "flags" in faults else st.sampled_from([False, False, False, True]))
    for name, usual in USUAL.items():
        if draw(st.booleans()):
            chosen[name] = draw(mostly(usual, ANYTHING, of=2)) if "parameters" in faults else draw(usual)
    if "parameters" in faults:
        chosen[draw(ODD_NAMES)] = draw(ANYTHING)
    return tuple(chosen.items())


@st.composite
def tensors(draw: st.DrawFn, start: bool, talks: bool, faults: Sequence[str]) -> tuple[Tensor, ...]:
    audio = draw(ODD_AUDIO if "audio" in faults else AUDIO if talks else KEEP_ALIVE)
    usual = GOOD_AVATAR if start else st.just(())
    given = (audio, *draw(BAD_AVATAR if "avatar" in faults else usual))
    if "tensors" in faults:  # some are missing, some there twice, in any order
        given = tuple(draw(st.lists(st.sampled_from(given), max_size=4)))
    return given


@st.composite
def requests(draw: st.DrawFn, session: Any, start: bool, talks: bool) -> Request:
    """A request with nothing wrong, or one or two things."""
    faults = draw(st.lists(st.sampled_from(FAULTS + START_FAULTS * start), max_size=1 if talks else 2))
    odd = "envelope" in faults
    return Request(
        draw(tensors(start, talks, faults)),
        draw(parameters(session, start, faults)),
        draw(OUTPUTS) if "outputs" in faults else (),
        draw(SAFE_TEXT) if odd else "",
        draw(st.sampled_from(["", "1", "99", "x", "-1", "1" * 40])) if odd else "",
        draw(st.none() | st.binary(max_size=20)) if odd else None,
        draw(DAMAGES) if "damage" in faults else ("none", None),
    )


@dataclass(frozen=True)
class Conversation:
    """Requests of at most two sessions, on one stream or each on its own, waiting for each answer or not."""

    requests: tuple[Request, ...]
    way: str

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What Hypothesis shows of one that fails; pictures would fill pages."""
        printer.text("\n".join([self.way, *(repr(request)[:500] for request in self.requests)]))


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    sessions = tuple(draw(st.lists(IDS, min_size=1, max_size=2)))
    talks = draw(st.integers(1, 5)) == 5  # far enough for the sink to be replaced
    said = []
    for index in range(draw(st.integers(6, 9) if talks else st.integers(1, 7))):
        start = index == 0 or draw(st.integers(1, 6)) == 6
        said.append(draw(requests(draw(st.sampled_from(sessions)), start, talks)))
    return Conversation(tuple(said), draw(st.sampled_from(["in turn", "at once", "alone", "unary"])))


# ---- the server


class Attacker:
    """Sends conversations, and holds every answer to what answers must be."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._stream = channel.stream_stream(f"{SERVICE}ModelStreamInfer")
        self._single = channel.unary_unary(f"{SERVICE}ModelInfer")
        self.sent = 0
        self.said: Counter[str] = Counter()

    def attack(self, conversation: Conversation) -> None:
        """Sessions end with their stream."""
        self.sent += len(conversation.requests)
        match conversation.way:
            case "unary":
                for request in conversation.requests:
                    self._call(request.serialised())
            case "alone":
                for request in conversation.requests:
                    self._together([request], in_turn=True)
            case way:
                self._together(conversation.requests, in_turn=way == "in turn")

    def _call(self, message: bytes) -> None:
        with pytest.raises(grpc.RpcError) as refused:
            self._single(message, timeout=LIMIT_S)
        self._check_close(refused.value)

    def _together(self, requests: Sequence[Request], in_turn: bool) -> None:
        messages = [request.serialised() for request in requests]
        readable = [len(message) <= MAX_MESSAGE_BYTES for message in messages]
        answered = threading.Semaphore(1 if in_turn else len(messages))
        answers = 0
        try:
            for answer in self._stream(self._paced(messages, answered), timeout=LIMIT_S):
                answers += 1
                answered.release()
                self._check(pb.ModelStreamInferResponse.FromString(answer).error_message)
        except grpc.RpcError as error:
            self._check_close(error)
        finally:
            answered.release()
        # A message that is too large ends the stream, and answers that are under way are lost.
        least = len(messages) if all(readable) else readable.index(False) if in_turn else 0
        assert least <= answers <= MOST_ANSWERS * len(messages), f"{answers} answers to {len(messages)} requests"

    @staticmethod
    def _paced(messages: list[bytes], answered: threading.Semaphore) -> Iterator[bytes]:
        for message in messages:
            answered.acquire()
            yield message

    def _check_close(self, error: Any) -> None:
        """Of a call that ended with an error: not because it hung, nor because the server had gone."""
        assert error.code() in CALL_CODES, error
        assert "Traceback" not in error.details(), error.details()
        self.said["call"] += 1

    def _check(self, text: str) -> None:
        code, sentence = parse_error(text)
        self.said[code.value if code else "ok"] += 1
        if not text:
            return
        assert "Traceback" not in text, text
        assert 'File "' not in text, text
        assert code not in (None, ErrorCode.FAILED), text
        assert "\n" not in sentence, text
        assert sentence.endswith("."), text


@contextmanager
def attacking(server: TritonServer) -> Iterator[Attacker]:
    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(server.options.url, options) as channel:
        yield Attacker(channel)


def storm(attacker: Attacker, drawn_from: int, count: int) -> None:
    """So many conversations, drawn from a seed."""

    @seed(drawn_from)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(conversations())
    def attack(conversation: Conversation) -> None:
        attacker.attack(conversation)

    attack()


def growth(mib: Sequence[float]) -> float:
    """From the first third of a series to the last, by their medians.

    At any moment a process may hold requests of tens of MiB, so that two single samples tell nothing.
    """
    third = len(mib) // 3
    return float(np.median(mib[-third:]) - np.median(mib[:third]))


def opening(avatar: Sequence[Tensor], index: int = 0, outputs: tuple[tuple[str, str | None, Any], ...] = ()) -> Request:
    """Block `index` of session 6, the first of which opens it."""
    block = Tensor("AUDIO", "INT16", (BLOCK_SAMPLES,), bytes(2 * BLOCK_SAMPLES))
    flags = (("sequence_id", 6), ("sequence_start", index == 0))
    return Request((block, *(avatar if index == 0 else ())), flags, outputs)


END = Request((Tensor("AUDIO", "INT16", (0,), b""),), (("sequence_id", 6), ("sequence_end", True)))


@contextmanager
def enduring(server: TritonServer, speech: Array, expected: Array) -> Iterator[tuple[Attacker, Memory]]:
    """An attacker beside a live session; asserts that the session's frames are right and that all processes stay."""
    with (
        attacking(server) as attacker,
        neighbour(server.options.url, speech, expected),
        watched(server) as memory,
    ):
        yield attacker, memory
    server.wait_ready(1.0)


def test_rubbish_is_answered_and_harms_nobody(server: TritonServer, speech: Array, expected: Array) -> None:
    """It has no bar on memory: in so few conversations the first messages of tens of MiB still enlarge the heaps."""
    with enduring(server, speech, expected) as (attacker, _):
        storm(attacker, 2, 30)
    assert attacker.sent >= 75
    assert attacker.said.keys() >= {"ok", "call", "INVALID_ARGUMENT", "FAILED_PRECONDITION"}


@pytest.mark.slow
def test_ten_thousand_requests_of_rubbish(server: TritonServer, speech: Array, expected: Array) -> None:
    with enduring(server, speech, expected) as (attacker, memory):
        storm(attacker, 1, 400)
        memory.series.clear()
        attacker.sent = 0
        storm(attacker, 2, 3600)
    assert attacker.sent >= 10_000
    for (name, _), series in memory.series.items():
        limit = SHARED_LIMIT if name == "/dev/shm" else PRIVATE_LIMIT
        if name != "this process":
            assert growth(series.mib) <= limit, f"{name} has grown by {growth(series.mib):.1f} MiB"


def test_every_good_picture_and_prompt_opens_a_session(server: TritonServer) -> None:
    with attacking(server) as attacker:
        for image, text in AVATARS:
            attacker.said.clear()
            attacker.attack(Conversation((opening((picture(image), prompt(text))), END), "in turn"))
            assert attacker.said["ok"] == 2, (image[:40], text[:40])


@pytest.mark.parametrize("index", range(len(bad_pictures())))
def test_every_bad_picture_is_refused_at_once(server: TritonServer, index: int) -> None:
    with attacking(server) as attacker:
        started_s = time.monotonic()
        attacker.attack(Conversation((opening((picture(bad_pictures()[index]),)),), "in turn"))
        assert time.monotonic() - started_s < AT_ONCE_S
        assert (attacker.said["INVALID_ARGUMENT"], attacker.said["ok"]) == (1, 0)


def test_a_client_that_wants_one_output_holds_nobody_up(server: TritonServer, speech: Array, expected: Array) -> None:
    """A session's sink comes from the last stage, whichever outputs it asks for."""
    avatar = tuple(make(data) for make, data in zip((picture, prompt), AVATARS[0], strict=True))
    said = tuple(opening(avatar, index, (("FIRST_FRAME", None, None),)) for index in range(6))
    with attacking(server) as attacker, neighbour(server.options.url, speech, expected):
        attacker.attack(Conversation((*said, END), "in turn"))
        assert attacker.said["ok"] == len(said) + 1  # every block, and the end: no block waited in vain for the sink
