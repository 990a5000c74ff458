"""The sampler's numbers: flow-matching Euler with a twice shifted schedule (spec section 8).

Pure arithmetic on the host; knows no network and no state.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from live_avatar.arrays import Array
from live_avatar.errors import ConfigError

TRAIN_TIMESTEPS = 1000
FIRST_TRAIN_SIGMA = 1 / TRAIN_TIMESTEPS


@dataclass(frozen=True)
class Schedule:
    """Noise levels of the K steps; `sigmas` has K + 1 entries and ends with 0, `timesteps` has K."""

    sigmas: tuple[float, ...]

    def __post_init__(self) -> None:
        falling = all(a > b for a, b in zip(self.sigmas, self.sigmas[1:], strict=False))
        if len(self.sigmas) < 2 or not falling or self.sigmas[-1] != 0.0 or self.sigmas[0] > 1.0:
            raise ConfigError(f"sigmas {self.sigmas} must fall from at most 1 to exactly 0; give at least two.")

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def timesteps(self) -> tuple[float, ...]:
        return tuple(float(np.float32(TRAIN_TIMESTEPS) * np.float32(s)) for s in self.sigmas[:-1])

    def euler(self, step: int, latent: Array, velocity: Array) -> Array:
        """x + (sigma_{i+1} - sigma_i) v in float32; `step` counts from 0."""
        delta = np.float32(self.sigmas[step + 1]) - np.float32(self.sigmas[step])
        return latent + delta * velocity


def _shifted(value: Array, shift: float) -> Array:
    return shift * value / (1 + (shift - 1) * value)


def make_schedule(steps: int, shift: float) -> Schedule:
    """The released schedule: equal steps between the shifted ends, shifted again (quirk Q1, which is matched)."""
    ends = _shifted(np.array([1.0, FIRST_TRAIN_SIGMA]), shift)
    sigmas = _shifted(np.linspace(ends[0], ends[1], steps), shift).astype(np.float32)
    return Schedule((*map(float, sigmas), 0.0))
