"""The sampler's numbers: flow-matching Euler, by default with the released, twice shifted schedule (spec section 8).

Pure arithmetic on the host; knows no network and no state.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from live_avatar.arrays import Array
from live_avatar.config import StreamConfig
from live_avatar.errors import ConfigError

TRAIN_TIMESTEPS = 1000
FIRST_TRAIN_SIGMA = 1 / TRAIN_TIMESTEPS


@dataclass(frozen=True)
class Schedule:
    """Noise levels of the K steps; `sigmas` has K + 1 entries and ends with 0, `timesteps` has K."""

    sigmas: tuple[float, ...]

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


def make_schedule(stream: StreamConfig) -> Schedule:
    """The stream's own noise levels, or the released ones for its number of steps."""
    return Schedule(stream.sigmas or _released_sigmas(stream.steps, stream.schedule_shift))


def without_idle_step(stream: StreamConfig) -> StreamConfig:
    """The same stream without its last step, whose interval is folded into the one before it.

    The released schedule's last step moves the latents by less than 1 % of the velocity (spec section 8), so the
    velocity of the step before stands in for it. Raises `ConfigError` for a stream of one step.
    """
    if stream.steps == 1:
        raise ConfigError("a schedule of 1 step has no step to drop; give it at least 2.")
    *kept, _, clean = make_schedule(stream).sigmas
    return dataclasses.replace(stream, steps=stream.steps - 1, sigmas=(*kept, clean))


def _shifted(value: Array, shift: float) -> Array:
    return shift * value / (1 + (shift - 1) * value)


def _released_sigmas(steps: int, shift: float) -> tuple[float, ...]:
    """Equal steps between the shifted ends, shifted again (quirk Q1, which is matched)."""
    ends = _shifted(np.array([1.0, FIRST_TRAIN_SIGMA]), shift)
    sigmas = _shifted(np.linspace(ends[0], ends[1], steps), shift).astype(np.float32)
    return (*map(float, sigmas), 0.0)
