"""The messages between a web page and its server, over one WebSocket; docs/web.md describes them for other clients.

Text messages are JSON objects with a `type`. Binary messages begin with their kind, and numbers are little-endian.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any, Final, TypeAlias

import numpy as np

from ..cutter import Samples
from ..errors import InvalidInput
from ..messages import Block
from ..protocol import DEFAULT_JPEG_QUALITY, FPS, SAMPLE_RATE_HZ
from ..text import printable

VERSION: Final = 1
DEFAULT_LABEL: Final = "AI-generated"

MAX_TEXT_CHARS: Final = 1_000
MAX_PICTURE_BYTES: Final = 4 * 1024 * 1024
MAX_JSON_CHARS: Final = 64 * 1024
MAX_MESSAGE_BYTES: Final = MAX_PICTURE_BYTES + 1
"""Of a WebSocket message; a longer one closes the connection with code 1009."""
MAX_SPEECH_S: Final = 30.0
"""Of speech in one message, and of speech that waits."""
_MAX_TURN: Final = 2**32 - 1

_SPEECH_HEADER: Final = struct.Struct("<BxxxI")
"""Kind, turn."""
_BLOCK_HEADER: Final = struct.Struct("<BBHIII")
"""Kind, whether there is speech, frames, turn, number of the first frame, bytes of the sound."""


class Kind(IntEnum):
    """The first byte of a binary message."""

    PICTURE = 1
    SPEECH = 2
    BLOCK = 3


class Fault(StrEnum):
    """The machine-readable cause of an error message."""

    PROTOCOL = "protocol"
    """The message does not follow the protocol, or is of another version."""
    KEY = "key"
    """The visitor's key is missing or wrong."""
    INVALID = "invalid"
    """The settings, the picture or the text are refused: the same again does not help."""
    FULL = "full"
    """All places are taken: try later."""
    NO_SERVER = "no_server"
    """The avatar's server does not answer, or is not ready."""
    LOST = "lost"
    """The session has ended although nobody asked for it: start again with the same settings."""


class ProtocolError(InvalidInput):
    """A message does not follow the protocol."""


@dataclass(frozen=True)
class Start:
    """The settings of a session. The next message is the picture, unless a built-in portrait is named."""

    portrait: str | None
    prompt: str
    seed: int
    label: str
    jpeg_quality: int
    key: str


@dataclass(frozen=True)
class Picture:
    """A visitor's own picture: a PNG, JPEG or WebP file."""

    data: bytes


@dataclass(frozen=True, eq=False)
class Speech:
    """Samples of a turn, int16 at 16 kHz."""

    samples: Samples
    turn: int


@dataclass(frozen=True)
class Say:
    """A text to be spoken in a turn."""

    text: str
    turn: int


@dataclass(frozen=True)
class Interrupt:
    """The begin of a turn: what was said before is dropped."""

    turn: int


@dataclass(frozen=True)
class Record:
    """A recording of what is shown begins."""


Message: TypeAlias = Start | Picture | Speech | Say | Interrupt | Record


def parse(data: str | bytes) -> Message:
    """Return the message of a visitor; raise ProtocolError for anything else."""
    return _parse_binary(data) if isinstance(data, bytes) else _parse_text(data)


def ready(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return the message that goes before the first block."""
    return {
        "type": "session.ready",
        "version": VERSION,
        "rate_hz": SAMPLE_RATE_HZ,
        "fps": FPS,
        "provenance": dict(provenance),
    }


def record_started(path: str) -> dict[str, Any]:
    """Return the message that a recording has begun; a POST to `path` ends it and is answered with the MP4."""
    return {"type": "record.started", "path": path}


def record_ended(message: str) -> dict[str, Any]:
    """Return the message of a recording that has ended although nobody asked for it; its file is to be fetched."""
    return {"type": "record.ended", "message": message}


def error(fault: Fault, message: str, *, ends: bool = True) -> dict[str, Any]:
    """Return the message of an error; `ends` says whether the session ends with it."""
    return {"type": "error", "code": fault.value, "message": message, "ends": ends}


def block_message(block: Block, turn: int) -> bytes:
    """Return a block of JPEG frames and its sound: header, size of each frame, samples, frames."""
    sound = block.audio.astype("<i2").tobytes()
    header = _BLOCK_HEADER.pack(
        Kind.BLOCK, bool(block.audio.any()), len(block.jpegs), turn, block.first_frame, len(sound)
    )
    sizes = np.array([len(jpeg) for jpeg in block.jpegs], "<u4").tobytes()
    return b"".join((header, sizes, sound, *block.jpegs))


def _parse_binary(data: bytes) -> Message:
    kind = data[0] if data else None
    if kind == Kind.PICTURE:
        return Picture(data[1:])
    if kind != Kind.SPEECH:
        raise ProtocolError(
            f"a binary message begins with {kind}; send {Kind.PICTURE} before a picture, {Kind.SPEECH} before speech"
        )
    sound = data[_SPEECH_HEADER.size :]
    if len(data) < _SPEECH_HEADER.size or len(sound) % 2:
        raise ProtocolError(f"a message of speech has {len(data)} bytes; send 8 bytes of header and 2 for each sample")
    if len(sound) > MAX_SPEECH_S * SAMPLE_RATE_HZ * 2:
        raise ProtocolError(f"a message has {len(sound) // 2} samples of speech; send at most {MAX_SPEECH_S:g} s")
    return Speech(np.frombuffer(sound, "<i2").astype(np.int16), _SPEECH_HEADER.unpack_from(data)[1])


def _parse_text(data: str) -> Message:
    if len(data) > MAX_JSON_CHARS:
        raise ProtocolError(f"a message has {len(data)} characters; send at most {MAX_JSON_CHARS}")
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise ProtocolError(f"a message is {printable(data, 40)!r}; send a JSON object")
    match fields.get("type"):
        case "session.start":
            return _start(fields)
        case "speech.text":
            return Say(_text(fields, "text"), _number(fields, "turn", 0, _MAX_TURN))
        case "speech.interrupt":
            return Interrupt(_number(fields, "turn", 0, _MAX_TURN))
        case "record.start":
            return Record()
        case other:
            raise ProtocolError(
                f"a message has the type {printable(repr(other), 60)}; send session.start, speech.text, "
                "speech.interrupt or record.start"
            )


def _start(fields: dict[str, Any]) -> Start:
    version = fields.get("version")
    if version != VERSION:
        raise ProtocolError(
            f"the page speaks version {printable(repr(version), 40)} of the protocol, and this server version "
            f"{VERSION}; reload the page"
        )
    return Start(
        portrait=_text(fields, "portrait") if fields.get("portrait") is not None else None,
        prompt=_text(fields, "prompt", ""),
        seed=_number(fields, "seed", 0, 2**63 - 1, 0),
        label=_text(fields, "label", DEFAULT_LABEL),
        jpeg_quality=_number(fields, "jpeg_quality", 1, 95, DEFAULT_JPEG_QUALITY),
        key=_text(fields, "key", ""),
    )


def _text(fields: dict[str, Any], name: str, default: str | None = None) -> str:
    value = fields.get(name, default)
    if not isinstance(value, str):
        raise ProtocolError(f"{name} is {printable(repr(value), 60)}; send a string")
    return value


def _number(fields: dict[str, Any], name: str, lowest: int, highest: int, default: int | None = None) -> int:
    value = fields.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
        raise ProtocolError(f"{name} is {printable(repr(value), 60)}; send an integer from {lowest} to {highest}")
    return value
