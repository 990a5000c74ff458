"""Measures of a clip of real video that need no weights: speech, cuts, and whether something moves with the speech.

All take frames in grey at 32 x 32 pixels (`small_grey`), so a clip of any size costs the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image

from live_avatar.arrays import Array
from live_avatar.config import SAMPLES_PER_FRAME
from live_avatar.inputs.speech import PCM_SCALE

SIDE = 32
CELL = 2
"""Pixels of a cell's side. A mouth in a head that fills the picture covers some 3 x 2 cells."""
CELLS = 4
"""Number of cells whose correlations are averaged: the ones that follow the sound best."""
QUIET_DBFS = -45.0
"""Loudness of a frame's sound below which it counts as silent; speech lies between -35 and -15."""
ROUNDING = 1e-6


@dataclass(frozen=True)
class Figures:
    """speech: share of frames with sound above `QUIET_DBFS`. loudness: of the whole clip, dBFS. cut: largest mean
    change of a pixel from a frame to the next, in levels of 255. still: share of frames that equal the one before.
    sync: correlation of the moving cells with the loudness, see `mouth_correlation`."""

    speech: float
    loudness: float
    cut: float
    still: float
    sync: float

    def to_dict(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in asdict(self).items()}


def small_grey(frame: Array) -> Array:
    """A frame uint8 [H, W, 3] -> float32 [32, 32]."""
    grey = Image.fromarray(frame).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(grey, dtype=np.float32)


def measure(grey: Array, speech: Array) -> Figures:
    """Figures of a clip: grey float32 [n, 32, 32]; speech int16 [n * 640]."""
    loud = loudness(speech)
    changes = np.abs(np.diff(grey, axis=0)).mean((1, 2)) if len(grey) > 1 else np.zeros(1)
    return Figures(
        speech=float((loud > 10 ** (QUIET_DBFS / 20)).mean()),
        loudness=_dbfs(float(np.sqrt(np.square(loud).mean()))),
        cut=float(changes.max()),
        still=float((changes < ROUNDING).mean()),
        sync=mouth_correlation(grey, loud),
    )


def loudness(speech: Array) -> Array:
    """RMS of the sound of each frame, int16 [n * 640] -> float64 [n], full scale 1."""
    blocks = speech.reshape(-1, SAMPLES_PER_FRAME) / PCM_SCALE
    return np.sqrt(np.square(blocks).mean(1))


def mouth_energy(grey: Array) -> Array:
    """How far each cell of the picture is from its usual look: [n, 32, 32] -> [n, 256], in levels of 255.

    The usual look is the median over the clip, in which a speaker's mouth is nearly closed.
    """
    away = np.abs(grey - np.median(grey, axis=0))
    count = SIDE // CELL
    cells: Array = away.reshape(len(grey), count, CELL, count, CELL).mean((2, 4)).reshape(len(grey), -1)
    return cells


def mouth_correlation(grey: Array, loud: Array) -> float:
    """Correlation of the energy of the picture's cells with the loudness [n]: the mean of the `CELLS` best cells.

    It needs no landmarks, so it is coarse: some 0.2 is chance, because the best of 256 cells are taken.
    """
    energy = mouth_energy(grey)
    moving, heard = energy - energy.mean(0), loud - loud.mean()
    spread = moving.std(0) * heard.std()
    seen = spread > ROUNDING
    if len(loud) < 2 or seen.sum() < CELLS:
        return 0.0
    correlations = (moving[:, seen] * heard[:, None]).mean(0) / spread[seen]
    return float(np.sort(correlations)[-CELLS:].mean())


def _dbfs(rms: float) -> float:
    return float(20 * np.log10(max(rms, 1 / PCM_SCALE)))


def quantiles(values: Sequence[float]) -> list[float]:
    """Least, 5 %, median, 95 % and largest."""
    return [float(one) for one in np.quantile(np.asarray(values), (0, 0.05, 0.5, 0.95, 1))]
