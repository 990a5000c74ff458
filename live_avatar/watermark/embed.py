"""Puts the mark into frames: adds a faint pattern, the same for all colours, in one pass of 8-bit arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from live_avatar.arrays import Array
from live_avatar.watermark.code import TILE, code_of
from live_avatar.watermark.key import Origin, WatermarkKey

STRENGTH: Final = 1.9
"""Root mean square of the pattern in 8-bit levels, where the picture has texture that hides it: 42.4 dB."""
SMOOTH_STRENGTH: Final = 1.2
"""The same where the picture is smooth: 46 dB."""
TEXTURE: Final = 3.0
"""Mean change from a pixel to its right and lower neighbours, in levels, from which on a block has texture."""
BLOCK: Final = 16
"""Side of the blocks of one strength, in pixels."""
SMALL_PIXELS: Final = 128 * 128
"""In frames of up to this size the pattern's sign alternates, and it is strong everywhere."""
HALF_PERIOD_FRAMES: Final = 12
"""Frames of one sign: 0.48 s at 25 frames per second. For as many frames the strength stays where it is."""


class Watermark:
    """The mark of one session for frames of one size.

    A small frame has too few pixels for the mark to stand out against a picture that does not move. There the sign of
    the pattern alternates, and the difference of the two signs removes what stays the same.
    """

    def __init__(self, key: WatermarkKey, origin: Origin, height: int, width: int) -> None:
        rows, columns = (-(-side // TILE) for side in (height, width))
        pattern = np.tile(code_of(key).tile(key.symbols(origin)), (rows, columns))[:height, :width, None]
        self._is_small = is_small(height, width)
        signs = (1, -1) if self._is_small else (1,)
        self._strong = [_steps(sign * STRENGTH * pattern) for sign in signs]
        self._weak = _steps(SMOOTH_STRENGTH * pattern)

    def apply(self, frames: Array, first: int) -> Array:
        """Frames uint8 [n, H, W, 3] -> the same with the mark, as a new array. first: number of the first, from 0."""
        marked = np.empty_like(frames)
        more, less = self._strong[0]
        for index, (frame, out) in enumerate(zip(frames, marked, strict=True)):
            number = first + index
            if index == 0 or number % HALF_PERIOD_FRAMES == 0:
                more, less = self._pattern(frame, number)
            np.add(frame, np.minimum(more, 255 - frame), out=out)
            np.subtract(out, np.minimum(less, frame), out=out)
        return marked

    def _pattern(self, frame: Array, number: int) -> Sequence[Array]:
        """What is added to the frames from a frame on, and what is taken from them, uint8 [H, W, 3]."""
        if self._is_small:
            return self._strong[number // HALF_PERIOD_FRAMES % 2]
        hidden = textured(frame)
        steps = []
        for weak, strong in zip(self._weak, self._strong[0], strict=True):
            steps.append(weak.copy())
            np.copyto(steps[-1], strong, where=hidden)
        return steps


def is_small(height: int, width: int) -> bool:
    """Whether the sign of the mark alternates in frames of this size."""
    return height * width <= SMALL_PIXELS


def textured(frame: Array) -> Array:
    """Where a frame uint8 [H, W, 3] has texture, bool [H, W, 3], the same for a whole block."""
    green = frame[..., 1].astype(np.int16)
    slope = np.abs(np.diff(green, axis=0, append=green[-1:])) + np.abs(np.diff(green, axis=1, append=green[:, -1:]))
    height, width = green.shape
    rows, columns = (-(-side // BLOCK) for side in green.shape)
    padded = np.pad(slope, [(0, rows * BLOCK - height), (0, columns * BLOCK - width)], mode="edge")
    rough = padded.reshape(rows, BLOCK, columns, BLOCK).mean(axis=(1, 3)) >= TEXTURE
    wide = np.repeat(np.repeat(rough, BLOCK, axis=0)[:height], 3 * BLOCK, axis=1)[:, : 3 * width]
    return wide.reshape(height, width, 3)


def _steps(pattern: Array) -> tuple[Array, Array]:
    """What a pattern [H, W, 1] adds and what it takes away, uint8 [H, W, 3]."""
    levels = np.repeat(np.rint(pattern).astype(np.int16), 3, axis=2)
    return np.maximum(levels, 0).astype(np.uint8), np.maximum(-levels, 0).astype(np.uint8)
