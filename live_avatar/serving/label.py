"""A visible label on video frames, such as "AI-generated": white text on a dark box in the lower right corner.

The size follows GB 45438-2025: the text is at least 5 % as tall as the frame's short side, at an edge or in a corner,
and clearly legible.
"""

from __future__ import annotations

import math
import unicodedata
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from live_avatar.arrays import Array
from live_avatar.errors import ConfigError, InputError

MAX_CHARACTERS = 64
LEAST_SHARE = 0.05  # share of the frame's short side, by GB 45438-2025
LEAST_PIXELS = 7  # smaller capital letters are not legible
BOX_OPACITY = 0.63  # keeps the contrast of white text above 4.5 to 1 on a white frame
GREATEST_EM = 3  # in heights of a capital letter; a font that needs more has no capital letters
UNASSIGNED = "\U0010ffff"  # no font has a glyph for it, so it shows the font's sign for missing glyphs

Font = ImageFont.FreeTypeFont


class Label:
    """A label for frames of one size. It is drawn once and blended into every frame."""

    def __init__(self, text: str, height: int, width: int, font: Path | None = None) -> None:
        """`text` in the lower right corner of frames of `height` x `width` pixels.

        `font` is a TrueType or OpenType file; the default is Pillow's font, which has only ASCII letters.
        Raises `InputError` for a text that is blank, longer than 64 characters, too large for the frame, or has
        characters without a glyph; `ConfigError` for a font that cannot be used.
        """
        text = unicodedata.normalize("NFC", text)
        _check_characters(text)
        least = text_height(height, width)
        letters = _sized(font, least)
        _check_glyphs(letters, text)
        coverage = _box(_ink(letters, text), least, text, height, width)[:, :, None]
        bottom, right = height - _padding(least), width - _padding(least)
        self._box = np.s_[:, bottom - coverage.shape[0] : bottom, right - coverage.shape[1] : right]
        # Text over box over frame: the remaining share of the frame's pixel, and the added white, in 1/255.
        self._left = np.rint((255 - coverage) * (1 - BOX_OPACITY)).astype(np.uint16)
        self._added = coverage.astype(np.uint16) * 255

    def draw(self, frames: Array) -> Array:
        """Frames uint8 [n, H, W, 3] of this label's size -> the same with the label, as a new array."""
        labelled = frames.copy()
        labelled[self._box] = (labelled[self._box] * self._left + self._added + 127) // 255
        return labelled


def text_height(height: int, width: int) -> int:
    """Least height of a capital letter in pixels, for frames of `height` x `width` pixels."""
    return max(math.ceil(LEAST_SHARE * min(height, width)), LEAST_PIXELS)


def _check_characters(text: str) -> None:
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"the label has {len(text)} characters, more than {MAX_CHARACTERS}; shorten it.")
    if not text.strip():
        raise InputError(f"the label {text!r} is blank; give it letters, or leave it out.")
    for character in text:
        category = unicodedata.category(character)
        if category[0] == "C" or category in ("Zl", "Zp"):
            raise InputError(
                f"the label {text!r} has {_named(character)}, which is not a printable character; remove it."
            )


def _check_glyphs(font: Font, text: str) -> None:
    missing = _drawn(font, UNASSIGNED)
    for character in text:
        if not character.isspace() and _drawn(font, character) == missing:
            raise InputError(
                f"the label {text!r} has {_named(character)}, for which the font {_title(font)} has no glyph; use "
                "other characters, or a server whose label_font has it."
            )


def _named(character: str) -> str:
    return f"{character!r} (U+{ord(character):04X})"


def _title(font: Font) -> str:
    return " ".join(filter(None, font.getname()))


def _drawn(font: Font, character: str) -> tuple[tuple[int, ...], bytes]:
    ink = _ink(font, character)
    return ink.shape, ink.tobytes()


def _sized(path: Path | None, least: int) -> Font:
    """The font in the smallest size whose capital letters are `least` pixels tall."""
    make = partial(_open, path)
    for size in range(least, GREATEST_EM * least):
        font = make(size)
        if _letter_height(_ink(font, "H")) >= least:
            return font
    raise ConfigError(f"the font {_title(make(least))} of {path} has no capital letters; choose another label_font.")


def _open(path: Path | None, size: int) -> Font:
    try:
        font = ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a font ({error}); give a TrueType or OpenType file as label_font.") from error
    if not isinstance(font, Font):
        raise ConfigError("this Pillow was built without FreeType, which draws labels; install another build of it.")
    return font


def _ink(font: Font, text: str) -> Array:
    """Coverage of a text's pixels, uint8 [h, w], cut to its bounding box."""
    left, top, right, bottom = (round(edge) for edge in font.getbbox(text))
    image = Image.new("L", (max(right - left, 1), max(bottom - top, 1)))
    ImageDraw.Draw(image).text((-left, -top), text, fill=255, font=font)
    return np.asarray(image)


def _letter_height(ink: Array) -> int:
    """Rows from the first to the last that have a pixel of more than half coverage."""
    rows = np.flatnonzero(ink.max(axis=1) >= 128)
    return int(np.ptp(rows)) + 1 if rows.size else 0


def _padding(least: int) -> int:
    """Pixels around the text in its box, and around the box."""
    return max(2, least // 3)


def _box(ink: Array, least: int, text: str, height: int, width: int) -> Array:
    """Coverage of the whole box, with the text in its middle."""
    tall = _letter_height(ink)
    if tall < least:
        raise InputError(f"the label {text!r} is {tall} px tall and needs {least} px; begin it with a capital letter.")
    padding = _padding(least)
    rows, columns = (side + 4 * padding for side in ink.shape)  # inside the box and around it
    if columns > width or rows > height:
        raise InputError(
            f"the label {text!r} takes {columns}x{rows} pixels with letters of {least}, but frames have "
            f"{width}x{height}; shorten it."
        )
    return np.pad(ink, padding)
