"""Shapes with smooth edges, on a transparent layer.

Lengths are in units of 1/96 of the picture's side, whatever its size in pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from live_avatar.arrays import Array

UNITS = 96
DRAWN = 4
"""Samples along a pixel's side when drawing."""
STORED = 2
"""Samples along a pixel's side of a finished layer."""

Colour: TypeAlias = tuple[int, int, int]
Point: TypeAlias = tuple[float, float]
Box: TypeAlias = tuple[int, int, int, int]
"""Left, top, right, bottom."""


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """The mix of two colours; `share` is that of the second."""
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(first, second, strict=True))
    return red, green, blue


def ellipse(middle: Point, rx: float, ry: float) -> Array:
    """Points of an outline, [n, 2]."""
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    return np.stack([middle[0] + rx * np.cos(angles), middle[1] + ry * np.sin(angles)], 1)


def box_of(size: int, box: Box) -> Box:
    """A box of units in samples of a finished layer, for a picture of `size` pixels."""
    left, top, right, bottom = (round(side * STORED * size / UNITS) for side in box)
    return left, top, right, bottom


class Canvas:
    """A transparent drawing of a box of the picture; coordinates count from the picture's corner."""

    def __init__(self, size: int, box: Box = (0, 0, UNITS, UNITS)) -> None:
        left, top, right, bottom = box_of(size, box)
        self._factor = DRAWN // STORED
        self._scale = DRAWN * size / UNITS
        self._corner = np.array([left, top]) * self._factor
        self._image = Image.new("RGBA", ((right - left) * self._factor, (bottom - top) * self._factor))
        self._draw = ImageDraw.Draw(self._image)

    def polygon(self, points: Iterable[Point] | Array, colour: Colour) -> None:
        self._draw.polygon(self._at(points), fill=colour)

    def ellipse(self, middle: Point, rx: float, ry: float, colour: Colour) -> None:
        self.polygon(ellipse(middle, rx, ry), colour)

    def line(self, points: Iterable[Point] | Array, width: float, colour: Colour) -> None:
        """A line with round ends."""
        at = self._at(points)
        self._draw.line(at, fill=colour, width=max(1, round(width * self._scale)), joint="curve")
        radius = width * self._scale / 2
        for x, y in (at[:2], at[-2:]):
            self._draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    def glow(self, points: Iterable[Point] | Array, blur: float, colour: Colour, opacity: float) -> None:
        """A polygon with a soft edge, only over pixels that are already drawn."""
        mask = Image.new("L", self._image.size)
        ImageDraw.Draw(mask).polygon(self._at(points), fill=round(255 * opacity))
        mask = mask.filter(ImageFilter.GaussianBlur(blur * self._scale))
        over = Image.new("RGBA", self._image.size, colour)
        over.putalpha(self._image.getchannel("A"))
        self._image.paste(over, mask=mask)
        self._draw = ImageDraw.Draw(self._image)

    def layer(self) -> Image.Image:
        """The drawing with `STORED` samples per pixel side, smoothed for sampling once per pixel."""
        stored = self._image.convert("RGBa").reduce(self._factor)
        return stored.filter(ImageFilter.BoxBlur(0.5)).convert("RGBA")

    def _at(self, points: Iterable[Point] | Array) -> list[float]:
        flat: list[float] = (np.asarray(points) * self._scale - self._corner).ravel().tolist()
        return flat
