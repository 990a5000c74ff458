"""Raw frames come from Triton through shared memory: a block of large frames would take long through another socket.

One region has a place for each block that may be under way; Triton writes the output FRAMES there, and the gateway
copies it once, into the answer for the caller. A block that finds no place takes the way of all other outputs.

Each gateway has a region of its own. Triton may still write into that of one that was killed, so such a region stays
registered, and its memory is given back to the system.
"""

from __future__ import annotations

import math
import mmap
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tritonclient.grpc import service_pb2

from live_avatar.gateway.requests import OUTPUT_NAMES, Message
from live_avatar_client.protocol import FRAMES, FRAMES_PER_BLOCK

SHARED_MEMORY: Final = Path("/dev/shm")
SMALLEST_BYTES: Final = 2**20
"""Blocks of fewer bytes are as fast through the socket."""
# Field numbers and wire types of KServe's messages, for the part that is written without a copy through protobuf.
_RESPONSE_TAG: Final = b"\x12"  # ModelStreamInferResponse.infer_response
_CONTENT_TAG: Final = b"\x32"  # ModelInferResponse.raw_output_contents


@dataclass(frozen=True)
class Place:
    """Where Triton writes the frames of one block: bytes of a region."""

    region: str
    offset: int
    size: int

    def part(self, number: int, parts: int) -> Place:
        """The place of one of a block's responses, counted from 0."""
        size = self.size // parts
        return Place(self.region, self.offset + number * size, size)


class FramePool:
    """A region in shared memory with `places` places for blocks of `height` x `width` pixels; closed at the end.

    The names of all regions of a server begin with `prefix`.
    """

    def __init__(self, prefix: str, places: int, height: int, width: int) -> None:
        self._prefix = prefix
        self._path = SHARED_MEMORY / f"{prefix}-{secrets.token_hex(8)}"
        size = FRAMES_PER_BLOCK * height * width * 3
        count = places if size >= SMALLEST_BYTES else 0
        self._free = [Place(self._path.name, n * size, size) for n in range(count)]
        self._memory: mmap.mmap | None = None
        self.is_registered = False
        if self._free:
            self._memory = self._create(places * size)

    def registration(self) -> Message | None:
        """The request that makes Triton know the region; None if there is none."""
        if self._memory is None:
            return None
        return service_pb2.SystemSharedMemoryRegisterRequest(
            name=self._path.name, key=f"/{self._path.name}", byte_size=len(self._memory)
        )

    def take(self) -> Place | None:
        """A free place; None without one."""
        return self._free.pop() if self.is_registered and self._free else None

    def give_back(self, place: Place) -> None:
        """The place may be taken again; Triton must have written its answer."""
        self._free.append(place)

    def answer(self, response: bytes, place: Place) -> bytes:
        """The serialized answer for the caller: Triton's, with the frames from the place in it."""
        answer = service_pb2.ModelStreamInferResponse.FromString(response).infer_response
        contents = list(answer.raw_output_contents)
        del answer.raw_output_contents[:]
        pieces: list[bytes | memoryview] = []
        with memoryview(self._memory or b"") as memory:
            for output, content in _with_contents(answer, contents):
                in_place = output.name == FRAMES.name and not content  # no frames: nothing of the place
                piece = memory[place.offset : place.offset + math.prod(output.shape)] if in_place else content
                output.ClearField("parameters")
                pieces += [_CONTENT_TAG, _varint(len(piece)), piece]
            head = answer.SerializeToString()
            length = len(head) + sum(map(len, pieces))
            return b"".join([_RESPONSE_TAG, _varint(length), head, *pieces])

    def release_others(self) -> None:
        """Gives back the memory of the regions of gateways before this one; what Triton writes there later is lost."""
        for path in SHARED_MEMORY.glob(f"{self._prefix}-*"):
            if path != self._path and (size := path.stat().st_size):
                with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as memory:
                    memory.madvise(mmap.MADV_REMOVE)

    def close(self) -> None:
        if self._memory is not None:
            self._memory.close()
            with suppress(OSError):
                self._path.unlink()

    def _create(self, size: int) -> mmap.mmap:
        descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)  # a full /dev/shm is told now, not by a signal later
            return mmap.mmap(descriptor, size)
        except OSError:
            self._path.unlink()
            raise
        finally:
            os.close(descriptor)


def ask_for_place(message: Message, place: Place) -> None:
    """Makes Triton write FRAMES to the place, if the request asks for it."""
    if not message.outputs:
        for name in OUTPUT_NAMES:
            message.outputs.add(name=name)
    for output in message.outputs:
        if output.name == FRAMES.name:
            output.parameters["shared_memory_region"].string_param = place.region
            output.parameters["shared_memory_offset"].int64_param = place.offset
            output.parameters["shared_memory_byte_size"].int64_param = place.size


def _with_contents(answer: Message, contents: list[bytes]) -> list[tuple[Message, bytes]]:
    """Each output with its content; Triton sends none for an output in shared memory."""
    if len(contents) == len(answer.outputs):
        return list(zip(answer.outputs, contents, strict=True))
    rest = iter(contents)
    return [(output, b"" if output.name == FRAMES.name else next(rest)) for output in answer.outputs]


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
