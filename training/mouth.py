"""Measures drawn faces in a video without the truth: the movement of the mouth, and the drift of the looks.

It relies on the data set's geometry (`training.data.features`): the mouth is near its known place, its inside is dark,
and its lips are less green than the skin. The reference picture gives the colour of the skin.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from live_avatar.arrays import Array
from live_avatar.errors import InputError
from training.data.canvas import UNITS, Box
from training.data.features import INSIDE

OPENING_PER_UNIT = 0.14
"""Opening (0..1) for each 1/96 of the picture's side of dark height: a fit to rendered clips."""
WIDTH_PER_UNIT, WIDTH_AT_0 = 0.067, -0.77
"""The same for the width: slope and intercept."""
_AREA = (48.0, 65.3)
_AREA_RADII = (16.0, 10.3)
"""An ellipse that contains the mouth in all poses, and otherwise almost only skin."""
_MIDDLE = 7
"""Number of columns (1/96 of the side) in the mean of the dark height; the highest columns count."""
_RED, _GREEN = 0, 1
_LIP_FLOOR = 0.08

ROUNDING = 1e-6

REGIONS: dict[str, tuple[Box, ...]] = {
    "background": ((2, 4, 11, 40), (85, 4, 94, 40)),
    "hair": ((41, 16, 55, 20),),
    "skin": ((31, 53, 36, 58), (60, 53, 65, 58)),
    "clothes": ((24, 92, 34, 96), (62, 92, 72, 96)),
}
"""Regions that do not change with the pose of head and mouth; the top of a bald head is skin."""


def measure_mouth(frames: Array, picture: Array) -> Array:
    """Opening and width of the mouth in the scale of `Clip.mouth`; opening 0 is that of the picture.

    frames uint8 [n, H, W, 3]; picture uint8 [H, W, 3] of the same face, mouth closed -> float32 [n, 2].
    Raises `InputError` for frames and a picture of other or different shapes.
    """
    _check(frames, picture)
    opening = _dark_height(frames, picture) - _dark_height(picture[None], picture)
    width = WIDTH_AT_0 + WIDTH_PER_UNIT * _lip_width(frames, picture)
    return np.stack([OPENING_PER_UNIT * opening, width], 1).astype(np.float32)


def correlation(measured: Array, truth: Array, lag: int = 0) -> float:
    """Pearson's correlation of two series [n], `measured` shifted by `lag`; 0 if one is constant up to rounding."""
    if measured.shape != truth.shape or measured.ndim != 1 or len(measured) < abs(lag) + 2:
        raise InputError(
            f"the series have shapes {list(measured.shape)} and {list(truth.shape)}; expected two of the same length, "
            f"at least {abs(lag) + 2} for lag {lag}."
        )
    late = measured[max(0, lag) : len(measured) + min(0, lag)]
    early = truth[max(0, -lag) : len(truth) - max(0, lag)]
    if min(late.std(), early.std()) < ROUNDING:
        return 0.0
    return float(np.corrcoef(late, early)[0, 1])


def best_lag(measured: Array, truth: Array, lags: Iterable[int]) -> int:
    """The one of `lags`, in frames, with the best correlation; positive if `measured` is late."""
    return max(lags, key=lambda lag: correlation(measured, truth, lag))


def looks_distance(frames: Array, picture: Array) -> Array:
    """Distance of the looks from the reference picture: frames uint8 [n, H, W, 3] -> float32 [n], in levels of 255.

    It is the mean over `REGIONS` of the Euclidean distance between the mean RGB colours. Sway gives about 1, another
    identity some tens.
    """
    _check(frames, picture)
    seen, expected = _region_colours(frames), _region_colours(picture[None])
    distance: Array = np.linalg.norm(seen - expected, axis=2).mean(1).astype(np.float32)
    return distance


def _check(frames: Array, picture: Array) -> None:
    if frames.ndim != 4 or frames.shape[1:] != picture.shape or picture.shape[2:] != (3,) or frames.dtype != np.uint8:
        raise InputError(
            f"frames are {frames.dtype} {list(frames.shape)} and the picture is {list(picture.shape)}; expected uint8 "
            "[n, H, W, 3] and [H, W, 3] of the same sides."
        )


def _mouth_area(pixels: Array, channel: int) -> tuple[Array, Array]:
    """One channel around the mouth, float32 [n, h, w], and a mask of the pixels that count, [h, w]."""
    side = pixels.shape[1]
    units = (np.arange(side) + 0.5) * UNITS / side
    x, y = (units - _AREA[0]) / _AREA_RADII[0], (units - _AREA[1]) / _AREA_RADII[1]
    rows, columns = np.flatnonzero(np.abs(y) < 1), np.flatnonzero(np.abs(x) < 1)
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    inside = np.hypot(*np.broadcast_arrays(x[None], y[:, None])) < 1
    return pixels[(slice(None), *box, channel)].astype(np.float32), inside[box]


def _darkness(frames: Array, picture: Array, channel: int) -> Array:
    """Darkness of the mouth's area: 0 where it is at least as bright as the skin, 1 where it is as dark as its inside.

    [n, H, W, 3] -> [n, h, w]
    """
    area, inside = _mouth_area(frames, channel)
    still, _ = _mouth_area(picture[None], channel)
    skin = 0.97 * np.percentile(still[0][inside], 60)
    return np.clip((skin - area) / (skin - INSIDE[channel]), 0, 1) * inside


def _dark_height(frames: Array, picture: Array) -> Array:
    """Height of the open mouth's inside in 1/96 of the side, [n]. It uses red, in which lips are as bright as skin."""
    per_unit = frames.shape[1] / UNITS
    heights = np.sort(_darkness(frames, picture, _RED).sum(1) / per_unit, axis=1)
    return heights[:, -round(_MIDDLE * per_unit) :].mean(1)


def _lip_width(frames: Array, picture: Array) -> Array:
    """Width of lips and inside in 1/96 of the side, [n]: the effective number of dark columns."""
    columns = np.maximum(0, _darkness(frames, picture, _GREEN) - _LIP_FLOOR).sum(1)  # [n, w]
    shade = np.median(np.sort(columns, axis=1)[:, : columns.shape[1] // 4], axis=1, keepdims=True)
    columns = np.maximum(0, columns - shade)
    even = np.square(columns.sum(1)) / np.maximum(np.square(columns).sum(1), 1e-6)
    return even * UNITS / frames.shape[1]


def _region_colours(pixels: Array) -> Array:
    """Mean colours of the regions, [n, H, W, 3] -> [n, regions, 3]."""
    scale = pixels.shape[1] / UNITS
    means = [
        np.mean([_box_mean(pixels, tuple(round(side * scale) for side in box)) for box in boxes], axis=0)
        for boxes in REGIONS.values()
    ]
    return np.stack(means, 1)


def _box_mean(pixels: Array, box: tuple[int, ...]) -> Array:
    left, top, right, bottom = box
    return pixels[:, top:bottom, left:right].mean((1, 2))
