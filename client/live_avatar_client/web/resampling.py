"""Changes the rate of sound that comes in chunks, with one band-limiting filter over all of them."""

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..cutter import Samples

_ZERO_CROSSINGS: Final = 16
_PASS: Final = 0.94
"""Share of the lower Nyquist frequency that passes."""


class StreamResampler:
    """A windowed sinc. Chunks of any size give the same samples as one whole; n become ceil(n * to / from)."""

    def __init__(self, from_hz: int, to_hz: int) -> None:
        self._step = from_hz / to_hz
        self._cutoff = _PASS * min(1.0, to_hz / from_hz)
        self._reach = math.ceil(_ZERO_CROSSINGS / self._cutoff)
        self._held: NDArray[np.float64] = np.zeros(self._reach)
        self._held_from = -self._reach
        """The place of the first held sample in the whole sound."""
        self._made = 0
        self._taken = 0

    def add(self, samples: Samples) -> Samples:
        """Return the samples that have become known with this chunk."""
        self._taken += len(samples)
        self._held = np.concatenate([self._held, samples.astype(np.float64)])
        last = self._held_from + len(self._held) - 1 - self._reach
        return self._make(math.floor(last / self._step) + 1)

    def finish(self) -> Samples:
        """Return the rest, with silence after the end."""
        self._held = np.concatenate([self._held, np.zeros(self._reach + 1)])
        return self._make(math.ceil(self._taken / self._step))

    def _make(self, stop: int) -> Samples:
        """Make the samples up to number `stop`, and forget what later ones do not need."""
        if stop <= self._made:
            return np.zeros(0, np.int16)
        places = np.arange(self._made, stop) * self._step
        nearest = np.floor(places).astype(np.int64)
        offsets = np.arange(-self._reach + 1, self._reach + 1)
        distance = (places - nearest)[:, None] - offsets
        window = np.cos(np.pi / 2 * np.clip(distance / (self._reach + 1), -1, 1)) ** 2
        taps = self._cutoff * np.sinc(self._cutoff * distance) * window
        sound = (self._held[nearest[:, None] + offsets - self._held_from] * taps).sum(1)
        self._made = stop
        needed = math.floor(stop * self._step) - self._reach + 1
        drop = max(0, needed - self._held_from)
        self._held, self._held_from = self._held[drop:], self._held_from + drop
        made: Samples = np.clip(np.rint(sound), -32768, 32767).astype(np.int16)
        return made
