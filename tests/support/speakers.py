"""The drawn face twice in one picture, as two people."""

from __future__ import annotations

import numpy as np
from PIL import Image

from live_avatar.arrays import Array
from live_avatar.assets import PORTRAIT
from live_avatar.config import TINY
from tests.support.pictures import encoded

TWO = TINY.with_stream(width=192, speakers=2)
LEFT, RIGHT = (0, 0, 96, 96), (96, 0, 96, 96)
"""Boxes of the two people, x, y, width, height."""


def two_faces() -> bytes:
    """A PNG of 192x96 pixels."""
    with Image.open(PORTRAIT) as portrait:
        face = np.asarray(portrait.convert("RGB").resize((96, 96)))
    return encoded(Image.fromarray(np.concatenate([face, face], axis=1)))


def box_text(box: tuple[int, ...]) -> bytes:
    return ",".join(map(str, box)).encode()


def drawn_mask(box: tuple[int, int, int, int]) -> bytes:
    """A PNG of the picture's size, white in the box."""
    x, y, width, height = box
    mask = np.zeros((96, 192), np.uint8)
    mask[y : y + height, x : x + width] = 255
    return encoded(Image.fromarray(mask))


def mouth_motion(frames: Array, box: tuple[int, int, int, int]) -> Array:
    """How much the mouth of a face changes from frame to frame, float [frames - 1], in pixel levels."""
    mouth = frames[:, 52:84, box[0] + 28 : box[0] + 68].astype(np.float64)
    motion: Array = np.abs(np.diff(mouth, axis=0)).mean(axis=(1, 2, 3))
    return motion
