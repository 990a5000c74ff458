"""HTTP/2 by hand: a connection to which a test writes any bytes, and frames that need not be right."""

from __future__ import annotations

import socket
import struct
import time
from contextlib import suppress
from enum import IntEnum
from typing import Any, Final

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
END_STREAM, END_HEADERS = 0x1, 0x4
PIECE_BYTES: Final = 1 << 16
LIMIT_S: Final = 60.0
STREAM_CALL: Final = "/inference.GRPCInferenceService/ModelStreamInfer"


class Kind(IntEnum):
    """Types of frames."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


def frame(kind: int, payload: bytes = b"", stream: int = 0, flags: int = 0, length: int | None = None) -> bytes:
    """length: what the frame says that it has; None for the truth."""
    said = len(payload) if length is None else length
    return struct.pack(">I", said)[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def setting(number: int, value: int) -> bytes:
    return struct.pack(">HI", number, value)


def literal(name: bytes, value: bytes, opcode: int = 0x00) -> bytes:
    """A header field of HPACK; with opcode 0x40 the other end keeps it in its table."""
    return bytes([opcode]) + _string(name) + _string(value)


def _string(text: bytes) -> bytes:
    return _integer(len(text), 7) + text


def _integer(value: int, bits: int) -> bytes:
    most = (1 << bits) - 1
    if value < most:
        return bytes([value])
    encoded, value = bytearray([most]), value - most
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def call_headers(path: str = STREAM_CALL, **extra: str) -> bytes:
    """The header block of a gRPC call."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    fields |= {name.replace("_", "-"): value for name, value in extra.items()}
    return b"".join(literal(name.encode(), value.encode()) for name, value in fields.items())


def call(stream: int, block: bytes | None = None, flags: int = END_HEADERS) -> bytes:
    """The HEADERS frame that opens a call."""
    return frame(Kind.HEADERS, call_headers() if block is None else block, stream, flags)


def message(content: bytes, compressed: int = 0, length: int | None = None) -> bytes:
    """A message in gRPC's framing. length: what it says that it has; None for the truth."""
    return struct.pack(">BI", compressed, len(content) if length is None else length) + content


class Connection:
    """A connection of plain text. It has sent the preface and its settings, unless `greets` is False."""

    def __init__(self, port: int, greets: bool = True) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S)
        self.is_open = True
        if greets:
            self.send(PREFACE + frame(Kind.SETTINGS))

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: Any) -> None:
        self._socket.close()

    def send(self, data: bytes) -> bool:
        """Sends what the other end takes; False once it has closed the connection, or takes nothing for long."""
        view = memoryview(data)
        try:
            while view and self.is_open:
                view = view[self._socket.send(view[:PIECE_BYTES]) :]
        except OSError:
            self.is_open = False
        return self.is_open

    def read(self, limit_s: float, until: bytes | None = None) -> bytes:
        """What comes within so long, or until `until` is part of it, or until the other end closes."""
        got, until_s = bytearray(), time.monotonic() + limit_s
        with suppress(OSError):
            while (left_s := until_s - time.monotonic()) > 0:
                self._socket.settimeout(left_s)
                if not (piece := self._socket.recv(PIECE_BYTES)):
                    break
                got += piece
                if until is not None and until in got:
                    break
        self._socket.settimeout(LIMIT_S)
        return bytes(got)
