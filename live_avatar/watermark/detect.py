"""Finds the mark in pictures whose size and place in the marked picture are not known.

Frames are averaged, since they all carry the same pattern. Strong and weak parts of the picture are brought to the same
strength, so that its own lines weigh little. At each size that the picture may have, the waves of known phase show the
shift at which they agree best. The best places of all are read, and the check of the bytes decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np

from live_avatar.arrays import Array
from live_avatar.watermark.code import HIGHEST, TILE, Code, code_of
from live_avatar.watermark.embed import HALF_PERIOD_FRAMES, SMALL_PIXELS
from live_avatar.watermark.key import CHECK_BITS, Origin, WatermarkKey

PERIOD: Final = 2 * HALF_PERIOD_FRAMES
LEVELS: Final = (1.0, 0.5, 2.0, 4.0)
"""Sizes of the picture relative to the marked one, each with half an octave to both sides."""
LEAST_PIXELS: Final = 48 * 48
MOST_PIXELS: Final = 1920 * 1920
"""Bounds of the size of the marked picture, for a picture that shows it whole or a part of it."""
USUAL_PIXELS: Final = 720 * 400
"""The level that leads to this size is looked at first."""
SCALE_STEP: Final = 0.003
"""Between the scales of the scan; the lines at the edge of 720 pixels then meet within a pixel."""
FINE_STEPS: Final = 2
KEPT: Final = 12
"""Places of a level that are looked at more closely."""
CLEAR: Final = 7.0
"""A place of this agreement is looked at as soon as it is seen."""
PHASES: Final = range(0, HALF_PERIOD_FRAMES, 3)
"""Frames at which a half period may begin; at most 1.5 of the 12 frames of each half are then taken for the other."""
READINGS: Final = 2_000
"""Places that are read at most for a file."""
FALSE_ALARM: Final = READINGS / 2**CHECK_BITS
"""The chance that a file without a mark of the key passes the check of 32 bits at one of these places: 4.7e-7. It holds
for any picture, because the check follows from the key."""


@dataclass(frozen=True)
class Found:
    """A mark. scale: size of the picture relative to the marked one, (height, width).

    z: agreement of all waves with the mark, in standard deviations of what a picture without it gives.
    alternating: whether the mark's sign alternates, as in small frames.
    """

    origin: Origin
    scale: tuple[float, float]
    z: float
    alternating: bool


class Place(NamedTuple):
    """A scale (height, width) and shift (in pixels of the marked picture), and how well the known waves agree there."""

    score: float
    scale: tuple[float, float]
    shift: tuple[float, float]


class Evidence:
    """The frames of a video, added up by their time within the period of an alternating mark."""

    def __init__(self) -> None:
        self.frames = 0
        self._sums: Array | None = None
        self._counts = np.zeros(PERIOD, dtype=np.int64)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the frames, (0, 0) before the first."""
        return (0, 0) if self._sums is None else (self._sums.shape[1], self._sums.shape[2])

    def add(self, luma: Array, time_s: float, fps: int = 25) -> None:
        """Adds a frame, [H, W] of any number type. All frames have the size of the first."""
        if self._sums is None:
            self._sums = np.zeros((PERIOD, *luma.shape), dtype=np.float32)
        phase = round(time_s * fps) % PERIOD
        self._sums[phase] += luma
        self._counts[phase] += 1
        self.frames += 1

    def mean(self) -> Array:
        """The mean of all frames, float32 [H, W]."""
        assert self._sums is not None
        return self._sums.sum(axis=0) / self.frames

    def difference(self, phase: int) -> Array | None:
        """Mean of the half period that begins at a phase minus that of the other, float32 [H, W]; None without both."""
        assert self._sums is not None
        order = (np.arange(PERIOD) + phase) % PERIOD
        halves = order[:HALF_PERIOD_FRAMES], order[HALF_PERIOD_FRAMES:]
        if not all(self._counts[half].any() for half in halves):
            return None
        first, second = (self._sums[half].sum(axis=0) / self._counts[half].sum() for half in halves)
        return first - second


def find(key: WatermarkKey, evidence: Evidence) -> Found | None:
    """The mark of a key in the frames; None if there is none that can be read."""
    if not evidence.frames or min(evidence.shape) < 2:
        return None
    reader, code = _Reader(key), code_of(key)
    if found := reader.first(Views(evidence.mean(), code), alternating=False):
        return found
    for phase in PHASES:
        picture = evidence.difference(phase)
        if picture is not None and (found := reader.first(Views(picture, code, SMALL_PIXELS), alternating=True)):
            return found
    return None


class _Reader:
    """Reads places, as many as the chance of a false alarm allows."""

    def __init__(self, key: WatermarkKey) -> None:
        self._key = key
        self._left = READINGS

    def first(self, views: Views, alternating: bool) -> Found | None:
        """The mark at the first place of a picture that has one."""
        for place in views.places():
            waves = turned(views.code, views.waves(place.scale), place.shift)
            for sign in (1, -1) if alternating else (1,):
                if self._left and (origin := self._origin(views.code, sign * waves)):
                    z = agreement_with(views.code, sign * waves, self._key.symbols(origin))
                    return Found(origin, place.scale, z, alternating)
        return None

    def _origin(self, code: Code, waves: Array) -> Origin | None:
        self._left -= 1
        return self._key.origin(read(code, waves))


class Views:
    """A picture at several levels of detail, in which waves of any scale can be read."""

    def __init__(self, picture: Array, code: Code, most_pixels: int = MOST_PIXELS) -> None:
        self.code = code
        self._lines: dict[float, Lines] = {}
        marked = {level: picture.size / level**2 for level in LEVELS}
        possible = [level for level in LEVELS if LEAST_PIXELS <= marked[level] <= 2 * most_pixels]
        self.levels = sorted(possible, key=lambda level: abs(np.log(marked[level] / USUAL_PIXELS)))
        for level in self.levels:
            step = max(1, int(2 * level))  # of the waves' least length, 5.6 pixels of the marked picture, half is left
            self._lines[level] = Lines(whitened(reduced(picture, step), 6 * level / step), step)
        self._is_flat = not np.ptp(picture)

    def waves(self, scale: tuple[float, float]) -> Array:
        """The waves complex [waves] at a scale, strong ones weakened: they are the picture's own."""
        near = min(self.levels, key=lambda level: abs(np.log(level / scale[0])))
        waves = self._lines[near].at(self.code, scale)
        strength = np.abs(waves)
        return waves / np.sqrt(strength**2 + np.median(strength) ** 2 + 1e-12)

    def places(self) -> Iterator[Place]:
        """Places to read, level by level: those that are clear as they are seen, and then the best ones."""
        for level in () if self._is_flat else self.levels:
            seen = []
            for scale in _scales(level):
                place = self.place((scale, scale), 1)
                if place.score >= CLEAR:
                    yield self._finer(place)
                else:
                    seen.append(place)
            yield from (self._finer(place) for place in sorted(seen, reverse=True)[:KEPT])

    def place(self, scale: tuple[float, float], per_pixel: int) -> Place:
        """The best shift at a scale, in steps of 1 / per_pixel."""
        surface = agreement(self.code, self.waves(scale), per_pixel)
        row, column = np.unravel_index(np.abs(surface).argmax(), surface.shape)
        shift = (float(row) / per_pixel, float(column) / per_pixel)
        return Place(float(abs(surface[row, column])), scale, shift)

    def _finer(self, place: Place) -> Place:
        """The best place near one, with a scale of its own for each side."""
        for axis, reach in ((0, 1.0), (1, 1.0), (0, 0.4), (1, 0.4)):
            offsets = SCALE_STEP * np.linspace(-reach, reach, 2 * FINE_STEPS + 1)
            sides = []
            for offset in offsets:
                scale = list(place.scale)
                scale[axis] *= float(np.exp(offset))
                sides.append(self.place((scale[0], scale[1]), 2))
            place = max(sides)
        return place


def _scales(level: float) -> Iterator[float]:
    """The scales of a level, from its middle to both sides."""
    yield level
    for step in range(1, round(np.log(2) / 2 / SCALE_STEP) + 1):
        yield from (level * np.exp(SCALE_STEP * step), level * np.exp(-SCALE_STEP * step))


class Lines:
    """The Fourier transform of a picture [H, W] at the lines of a tile of any scale. step: pixels averaged in it."""

    def __init__(self, picture: Array, step: int) -> None:
        self._picture = picture
        height, width = picture.shape
        self._y, self._x = step * np.arange(height), step * np.arange(width)
        self._rows: tuple[float, Array] | None = None

    def at(self, code: Code, scale: tuple[float, float]) -> Array:
        """The waves of a tile of `scale` (height, width) times its size, complex [waves]."""
        if self._rows is None or self._rows[0] != scale[0]:
            left = _waves(self._y, scale[0])
            parts = np.concatenate([left.real, left.imag]) @ self._picture
            self._rows = scale[0], parts[: len(left)] + 1j * parts[len(left) :]
        right = _waves(self._x, scale[1])
        grid = self._rows[1] @ np.concatenate([right[:0:-1].conj(), right]).T
        return grid[code.ky, code.kx + HIGHEST]


def _waves(places: Array, scale: float) -> Array:
    """exp(-2πi k x / (TILE scale)) for k from 0 to HIGHEST, complex64 [HIGHEST + 1, places]."""
    powers = np.empty((HIGHEST + 1, len(places)), dtype=np.complex64)
    powers[0], powers[1:] = 1, np.exp(places * (-2j * np.pi / (TILE * scale)))
    return np.cumprod(powers, axis=0, out=powers)


def agreement(code: Code, waves: Array, per_pixel: int) -> Array:
    """How well the waves of known phase agree at each shift, float32 [shifts, shifts], in standard deviations."""
    seen = waves[code.sync]
    grid = np.zeros((HIGHEST + 1, 2 * HIGHEST + 1), dtype=np.complex64)
    grid[code.ky[code.sync], code.kx[code.sync] + HIGHEST] = seen * code.sync_phases.conj()
    rows, columns = _shifts(per_pixel)
    along = rows @ grid
    # The real part alone, as one product. Few waves are used, so this is faster than a Fourier transform.
    surface: Array = np.concatenate([along.real, along.imag], axis=1) @ columns
    return surface / (np.sqrt(np.sum(np.abs(seen) ** 2) / 2) + 1e-12)


@lru_cache
def _shifts(per_pixel: int) -> tuple[Array, Array]:
    """exp(2πi k s / TILE) at each shift s. For ky complex64 [shifts, HIGHEST + 1]; for kx its real and minus its
    imaginary parts, float32 [2 (2 HIGHEST + 1), shifts]."""
    turns = 2j * np.pi * np.arange(TILE * per_pixel) / (TILE * per_pixel)
    rows = np.exp(np.outer(turns, np.arange(HIGHEST + 1)))
    columns = np.exp(np.outer(np.arange(-HIGHEST, HIGHEST + 1), turns))
    return rows.astype(np.complex64), np.concatenate([columns.real, -columns.imag]).astype(np.float32)


def turned(code: Code, waves: Array, shift: tuple[float, float]) -> Array:
    """The waves as they are without the shift."""
    return waves * np.exp(2j * np.pi / TILE * (code.ky * shift[0] + code.kx * shift[1]))


def read(code: Code, waves: Array) -> Array:
    """The bytes that fit the waves best, [SYMBOLS]."""
    fits = (waves[code.groups][:, None] @ code.patterns.conj().swapaxes(1, 2))[:, 0].real
    return fits.argmax(axis=1)


def agreement_with(code: Code, waves: Array, symbols: Array) -> float:
    """How well all waves agree with those of a mark, in standard deviations."""
    expected = np.zeros(len(waves), dtype=np.complex128)
    expected[code.sync] = code.sync_phases
    for group, patterns, symbol in zip(code.groups, code.patterns, symbols, strict=True):
        expected[group] = patterns[symbol]
    return float(np.sum(waves * expected.conj()).real / np.sqrt(np.sum(np.abs(waves) ** 2) / 2))


def whitened(picture: Array, reach: float) -> Array:
    """A picture float32 [H, W] without what is coarser than `reach` pixels, and with all its parts equally strong."""
    pixels = max(1, round(reach))
    detail = picture - box_mean(picture, pixels)
    strength = np.sqrt(box_mean(detail * detail, 2 * pixels)) + 0.3
    return np.clip(detail / strength, -2.5, 2.5).astype(np.float32)


def reduced(picture: Array, step: int) -> Array:
    """The means of step x step pixels, float32 [H // step, W // step]."""
    height, width = (side // step * step for side in picture.shape)
    cut = picture[:height, :width].reshape(height // step, step, width // step, step)
    return cut.mean(axis=(1, 3), dtype=np.float32)


def box_mean(picture: Array, reach: int) -> Array:
    """The mean of the (2 reach + 1)² pixels around each, float32 [H, W]; the pixels at the edges are repeated."""
    width = 2 * reach + 1
    for _ in range(2):
        padded = np.pad(picture, [(reach + 1, reach), (0, 0)], mode="edge")
        sums = np.cumsum(padded, axis=0, dtype=np.float64)
        picture = ((sums[width:] - sums[:-width]) / width).astype(np.float32).T
    return picture
