"""The code of the mark: which waves of a square tile carry it, and with which phases.

The tile is repeated over the picture, so its waves are lines in the picture's spectrum: a part of the picture is enough
to read them, a shift turns their phases, and another size of the picture moves the lines. Some waves have phases that
follow from the key alone, and show shift and size. The others are dealt out to the mark's bytes, and the phases of a
byte's waves are one of 256 patterns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np

from live_avatar.arrays import Array
from live_avatar.watermark.key import SYMBOLS, WatermarkKey

TILE: Final = 96
"""Side of the tile in pixels of the marked picture."""
LOWEST: Final = 3
HIGHEST: Final = 17
"""With `LOWEST` the range of the waves, in periods along a tile: coarse enough for half the size, and too fine for
blotches."""
SYNC_SHARE: Final = 0.15
"""Share of the waves that show shift and size."""
VALUES: Final = 256


@dataclass(frozen=True)
class Code:
    """The waves of a key. They are half of a tile's spectrum, whose other half mirrors them.

    ky, kx int [waves]: periods along a tile. sync int [n]: waves of known phase. groups int [SYMBOLS, m]: the waves of
    each byte. sync_phases complex [n] and patterns complex [SYMBOLS, 256, m]: numbers of magnitude 1.
    """

    ky: Array
    kx: Array
    sync: Array
    groups: Array
    sync_phases: Array
    patterns: Array

    def tile(self, symbols: Array) -> Array:
        """The tile that carries the bytes [SYMBOLS], float64 [TILE, TILE], mean 0 and mean square 1."""
        spectrum = np.zeros((TILE, TILE), dtype=np.complex128)
        spectrum[self.ky[self.sync], self.kx[self.sync]] = self.sync_phases
        for group, patterns, symbol in zip(self.groups, self.patterns, symbols, strict=True):
            spectrum[self.ky[group], self.kx[group]] = patterns[symbol]
        tile = np.fft.ifft2(spectrum).real
        return tile / np.sqrt(np.mean(tile**2))


@lru_cache(maxsize=8)
def code_of(key: WatermarkKey) -> Code:
    """The code that follows from a key."""
    ky, kx = (axis.ravel() for axis in np.mgrid[: HIGHEST + 1, -HIGHEST : HIGHEST + 1])
    radius = np.hypot(ky, kx)
    used = (radius >= LOWEST) & (radius <= HIGHEST) & ((ky > 0) | (kx > 0))
    ky, kx = ky[used], kx[used]
    order = np.argsort(key.bytes_for("order", 8 * len(ky)).view("<u8"), kind="stable")
    size = int(len(ky) * (1 - SYNC_SHARE)) // SYMBOLS
    groups, sync = order[: SYMBOLS * size].reshape(SYMBOLS, size), order[SYMBOLS * size :]
    turns = key.bytes_for("sync", len(sync)), key.bytes_for("patterns", SYMBOLS * VALUES * size)
    sync_phases, patterns = (np.exp(2j * np.pi / 256 * turn) for turn in turns)
    return Code(ky, kx, sync, groups, sync_phases, patterns.reshape(SYMBOLS, VALUES, size))
