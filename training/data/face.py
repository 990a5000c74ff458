"""Draws a face: an identity and a pose give pixels.

Parts that do not move in a clip are drawn once; a frame then needs only a mouth and the placing of the head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from live_avatar.arrays import Array
from training.data.canvas import STORED, UNITS, Box, Canvas, Colour, box_of
from training.data.features import Features
from training.data.identity import Identity

PIVOT = (48.0, 84.0)
"""The neck, about which the head turns."""
LIDS = 5
"""Number of drawn positions of the eyelids, with open and shut."""
JAW_TOP, JAW_STRETCH = 58, 0.15
"""At opening 1 the face below this height is longer by this share."""
MOUTH_BOX: Box = (30, 54, 66, 78)
EYES_BOX: Box = (18, 32, 78, 58)


@dataclass(frozen=True)
class Pose:
    """The moving parts. opening and width of the mouth, 0..1; lid: 0 open, 1 shut; x and y in 1/96 of the picture's
    side; angle in degrees."""

    opening: float = 0.0
    width: float = 0.5
    lid: float = 0.0
    x: float = 0.0
    y: float = 0.0
    angle: float = 0.0


class Face:
    """One identity at one size, in pixels."""

    def __init__(self, identity: Identity, size: int) -> None:
        self._size = size
        self._features = Features(identity)
        self._background = _gradient(size, self._features.background)
        self._back_hair = self._layer(self._features.draw_back_hair)
        self._body = self._placed(self._layer(self._features.draw_body), Pose())
        head = self._layer(self._features.draw_head)
        self._heads = [self._with_eyes(head, index / (LIDS - 1)) for index in range(LIDS)]

    def frame(self, pose: Pose) -> Array:
        """Pixels uint8 [size, size, 3]."""
        head = self._heads[round(pose.lid * (LIDS - 1))].copy()
        self._drop_jaw(head, pose.opening)
        self._add(head, MOUTH_BOX, lambda canvas: self._features.draw_mouth(canvas, pose.opening, pose.width))
        picture = self._background.copy()
        for layer in (self._placed(self._back_hair, pose), self._body, self._placed(head, pose)):
            picture.alpha_composite(layer)
        return np.array(picture.convert("RGB"))

    def _layer(self, draw: Callable[[Canvas], None]) -> Image.Image:
        canvas = Canvas(self._size)
        draw(canvas)
        return canvas.layer()

    def _with_eyes(self, head: Image.Image, lid: float) -> Image.Image:
        head = head.copy()
        self._add(head, EYES_BOX, lambda canvas: self._features.draw_eyes(canvas, lid))
        return head

    def _add(self, layer: Image.Image, box: Box, draw: Callable[[Canvas], None]) -> None:
        """Draws over a box of the layer, in place."""
        canvas = Canvas(self._size, box)
        draw(canvas)
        layer.alpha_composite(canvas.layer(), box_of(self._size, box)[:2])

    def _drop_jaw(self, head: Image.Image, opening: float) -> None:
        """Lengthens the face below the nose, in place."""
        top = round(JAW_TOP * STORED * self._size / UNITS)
        width, height = head.size
        extent = (0, top, width, top + (height - top) / (1 + JAW_STRETCH * opening))
        lower = head.transform((width, height - top), Image.Transform.EXTENT, extent, Image.Resampling.BILINEAR)
        head.paste(lower, (0, top))

    def _placed(self, layer: Image.Image, pose: Pose) -> Image.Image:
        """The layer moved and turned about the neck, with one sample per pixel."""
        scale = self._size / UNITS
        cos, sin = math.cos(math.radians(pose.angle)), math.sin(math.radians(pose.angle))
        px, py = PIVOT[0] * scale, PIVOT[1] * scale
        x, y = px + pose.x * scale, py + pose.y * scale
        inverse = np.array([cos, sin, px - cos * x - sin * y, -sin, cos, py + sin * x - cos * y]) * STORED
        sides = (self._size, self._size)
        return layer.transform(sides, Image.Transform.AFFINE, inverse.tolist(), Image.Resampling.BILINEAR)


def _gradient(size: int, colour: Colour) -> Image.Image:
    """A wall, lighter above the head's left and darker at the bottom."""
    y, x = np.mgrid[0 : 1 : size * 1j, 0 : 1 : size * 1j]
    light = 1.1 - 0.3 * np.hypot(x - 0.35, y - 0.2)
    pixels = np.clip(light[..., None] * colour, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).convert("RGBA")
