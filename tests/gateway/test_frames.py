"""Frames in shared memory: an answer has those of its own block only."""

from __future__ import annotations

import mmap
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tritonclient.grpc import service_pb2

from live_avatar.gateway.frames import FramePool, Place, ask_for_place
from live_avatar_client.protocol import FRAMES_PER_BLOCK

SIDE = 256
BLOCK_BYTES = FRAMES_PER_BLOCK * SIDE * SIDE * 3


@pytest.fixture
def pool() -> Iterator[FramePool]:
    made = new_pool(f"live-avatar-test-{uuid.uuid4().hex}")
    made.is_registered = True
    file_of(made).write_bytes(b"\1" * BLOCK_BYTES + b"\2" * BLOCK_BYTES)
    yield made
    made.close()


def new_pool(prefix: str) -> FramePool:
    return FramePool(prefix, 2, SIDE, SIDE)


def file_of(pool: FramePool) -> Path:
    request: Any = pool.registration()
    return Path("/dev/shm" + request.key)


def answer(pool: FramePool, place: Place, rows: int, contents: list[bytes]) -> list[bytes]:
    """The raw contents that the caller gets for FIRST_FRAME and FRAMES."""
    message = service_pb2.ModelStreamInferResponse()
    message.infer_response.outputs.add(name="FIRST_FRAME", datatype="INT64", shape=[1])
    message.infer_response.outputs.add(name="FRAMES", datatype="UINT8", shape=[rows, SIDE, SIDE, 3])
    message.infer_response.raw_output_contents.extend(contents)
    read = service_pb2.ModelStreamInferResponse.FromString(pool.answer(message.SerializeToString(), place))
    return list(read.infer_response.raw_output_contents)


@pytest.mark.parametrize("contents", [[b"12345678", b""], [b"12345678"]], ids=["triton 24.10", "without an entry"])
def test_frames_come_from_the_place(pool: FramePool, contents: list[bytes]):
    for _ in range(2):
        place = pool.take()
        assert place is not None
        byte = bytes([1 + place.offset // BLOCK_BYTES])
        assert answer(pool, place, FRAMES_PER_BLOCK, contents) == [b"12345678", byte * BLOCK_BYTES]
    assert pool.take() is None


def test_an_answer_without_frames_has_nothing_of_the_place(pool: FramePool):
    """A place holds the frames of the block before, which may be another caller's."""
    place = pool.take()
    assert place is not None
    assert answer(pool, place, 0, [b"12345678", b""]) == [b"12345678", b""]
    few = SIDE * SIDE * 3
    assert len(answer(pool, place, 1, [b"12345678", b""])[1]) == few
    assert answer(pool, place, 1, [b"12345678", b"\7" * few]) == [b"12345678", b"\7" * few]


def test_frames_alone_are_asked_for_in_the_place():
    message: Any = service_pb2.ModelInferRequest()
    ask_for_place(message, Place("region", 5, 7))
    chosen = {output.name: dict(output.parameters) for output in message.outputs}
    assert {name for name, parameters in chosen.items() if parameters} == {"FRAMES"}
    assert chosen["FRAMES"]["shared_memory_offset"].int64_param == 5
    assert chosen["FRAMES"]["shared_memory_region"].string_param == "region"


def test_a_gateway_shares_no_region_with_one_that_was_killed():
    """Triton may still write into the old region: it must hit neither the new one nor the ground."""
    prefix = f"live-avatar-test-{uuid.uuid4().hex}"
    killed = new_pool(prefix)
    with file_of(killed).open("r+b") as file, mmap.mmap(file.fileno(), 2 * BLOCK_BYTES) as triton:
        triton[:] = b"\1" * len(triton)
        made = new_pool(prefix)
        names: set[Any] = {pool.registration().name for pool in (killed, made)}  # type: ignore[union-attr]
        assert len(names) == 2
        made.release_others()
        assert file_of(killed).stat().st_blocks == 0, "its memory is not given back"
        triton[:] = b"\2" * len(triton)
        made.is_registered = True
        place = made.take()
        assert place is not None
        assert answer(made, place, FRAMES_PER_BLOCK, [b"12345678", b""])[1] == bytes(BLOCK_BYTES)
        made.release_others()
        assert file_of(killed).stat().st_blocks == 0
        made.close()
    killed.close()
