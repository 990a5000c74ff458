"""The three parts of the data, and the random numbers of a sample."""

from __future__ import annotations

from enum import Enum

import numpy as np


class Split(Enum):
    """The part of a sample. No two parts share a voice, a word list, a sentence pattern or an identity."""

    TRAIN = 0
    VALIDATION = 1
    TEST = 2


class Part(Enum):
    """The purpose of a random stream. Each part of a sample has its own, so a change of one part keeps the others."""

    SPEECH = 0
    IDENTITY = 1
    MOTION = 2


def generator(split: Split, seed: int, part: Part) -> np.random.Generator:
    """The random numbers of one part of sample `seed` (0 or more)."""
    return np.random.default_rng([split.value, seed, part.value])
