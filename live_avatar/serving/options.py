"""The options of a session, from the parameters of its first request; the stages share one reader of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from live_avatar.errors import InputError
from live_avatar.serving.label import Label
from live_avatar_client import protocol
from live_avatar_client.protocol import FrameFormat


@dataclass(frozen=True)
class SessionOptions:
    """The options of one session. label: drawn on every frame. frames_per_response: 4 or 12, the whole block."""

    seed: int
    frame_format: FrameFormat
    jpeg_quality: int
    label: Label | None
    frames_per_response: int


@dataclass(frozen=True)
class OptionsReader:
    """Reads the options of sessions whose frames have `height` x `width` pixels. label_font: None is the built-in.
    label: the operator's, which every session has in place of the caller's.
    """

    height: int
    width: int
    label_font: Path | None = None
    label: str | None = None

    def read(self, parameters: Mapping[str, object]) -> SessionOptions:
        """Raises `InputError` for a value of another type or out of bounds, or a label that cannot be drawn."""
        seed = read_seed(parameters)
        frame_format = _frame_format(parameters)
        quality = _integer(
            parameters,
            protocol.JPEG_QUALITY_PARAMETER,
            protocol.DEFAULT_JPEG_QUALITY,
            protocol.MIN_JPEG_QUALITY,
            protocol.MAX_JPEG_QUALITY,
        )
        text = self.label or _text(parameters, protocol.LABEL_PARAMETER, protocol.MAX_LABEL_CHARS)
        label = Label(text, self.height, self.width, self.label_font) if text else None
        return SessionOptions(seed, frame_format, quality, label, _frames_per_response(parameters))


def read_seed(parameters: Mapping[str, object]) -> int:
    """The seed; 0 if there is none. Raises `InputError` as `OptionsReader.read` does."""
    return _integer(parameters, protocol.SEED_PARAMETER, 0, 0, protocol.MAX_SEED)


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


def _frames_per_response(parameters: Mapping[str, object]) -> int:
    value = parameters.get(protocol.FRAMES_PER_RESPONSE_PARAMETER, protocol.FRAMES_PER_BLOCK)
    if isinstance(value, bool) or not isinstance(value, int) or value not in protocol.FRAMES_PER_RESPONSE:
        numbers = " or ".join(map(str, protocol.FRAMES_PER_RESPONSE))
        raise InputError(
            f"parameter {protocol.FRAMES_PER_RESPONSE_PARAMETER} is {_shown(value)}; it must be {numbers}."
        )
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
    """A value for a message, shortened."""
    shown = repr(value)
    return shown if len(shown) <= most else f"{shown[:most]}..."
