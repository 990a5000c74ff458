"""What a client asks for in the parameters of its first request.

Knows the parameters' names, types and bounds; conditioning checks them once, and the stages read them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from live_avatar.errors import InputError
from live_avatar_client import protocol
from live_avatar_client.protocol import FrameFormat

MAX_TOKEN_CHARS = 256


@dataclass(frozen=True)
class SessionOptions:
    """The options of one session; `label` is text to draw on every frame, empty for none."""

    seed: int
    frame_format: FrameFormat
    jpeg_quality: int
    label: str

    @classmethod
    def parse(cls, parameters: Mapping[str, object]) -> SessionOptions:
        """Raises `InputError` for a value of another type or outside its bounds."""
        return cls(
            _integer(parameters, protocol.SEED_PARAMETER, 0, 0, protocol.MAX_SEED),
            _frame_format(parameters),
            _integer(
                parameters,
                protocol.JPEG_QUALITY_PARAMETER,
                protocol.DEFAULT_JPEG_QUALITY,
                protocol.MIN_JPEG_QUALITY,
                protocol.MAX_JPEG_QUALITY,
            ),
            _text(parameters, protocol.LABEL_PARAMETER, protocol.MAX_LABEL_CHARS),
        )


def token(parameters: Mapping[str, object]) -> str:
    """The session's secret; empty if the client sends none."""
    return _text(parameters, protocol.TOKEN_PARAMETER, MAX_TOKEN_CHARS)


def _integer(parameters: Mapping[str, object], name: str, default: int, least: int, most: int) -> int:
    value = parameters.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InputError(f"parameter {name} is {_shown(value)}; it must be an integer from {least} to {most}.")
    return value


def _text(parameters: Mapping[str, object], name: str, most: int) -> str:
    value = parameters.get(name, "")
    if not isinstance(value, str) or len(value) > most:
        raise InputError(f"parameter {name} is {_shown(value)}; it must be a string of at most {most} characters.")
    return value


def _frame_format(parameters: Mapping[str, object]) -> FrameFormat:
    value = parameters.get(protocol.FRAME_FORMAT_PARAMETER, FrameFormat.RAW.value)
    try:
        return FrameFormat(str(value))
    except ValueError:
        names = " or ".join(f.value for f in FrameFormat)
        raise InputError(
            f"parameter {protocol.FRAME_FORMAT_PARAMETER} is {_shown(value)}; it must be {names}."
        ) from None


def _shown(value: object, most: int = 60) -> str:
    """A value for a message, cut short."""
    shown = repr(value)
    return shown if len(shown) <= most else f"{shown[:most]}..."
