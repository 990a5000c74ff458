"""Flow matching as in the released sampler: noise levels, noisy latents and velocities (spec section 8).

A level σ is the share of noise: x = (1 - σ) x0 + σ ε, and the velocity is ε - x0 at every level.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from live_avatar.config import StreamConfig
from live_avatar.model.schedule import TRAIN_TIMESTEPS, make_schedule


def chance(share: float, draw: torch.Generator) -> bool:
    """True in `share` of the draws."""
    return torch.rand((), generator=draw).item() < share


def choice(values: Sequence[float], draw: torch.Generator) -> float:
    """One of the values, with equal probabilities."""
    return values[int(torch.randint(len(values), (), generator=draw))]


def training_levels(stream: StreamConfig) -> tuple[float, ...]:
    """The levels of training, with equal probabilities: the released schedule with one step per timestep.

    Its shift puts three quarters of them above 0.5, where the content of a picture is decided.
    """
    return make_schedule(dataclasses.replace(stream, steps=TRAIN_TIMESTEPS, sigmas=None)).sigmas[:-1]


def timestep(level: float) -> float:
    """The timestep of a level, as the sampler's float32 product."""
    return float(np.float32(TRAIN_TIMESTEPS) * np.float32(level))


def mixed(clean: Tensor, noise: Tensor, level: float) -> Tensor:
    """The noisy latents of a level."""
    return (1 - level) * clean + level * noise


def moved(noisy: Tensor, velocity: Tensor, level: float, to: float) -> Tensor:
    """One Euler step from a level to another; to 0, it predicts the clean latents."""
    return noisy + (to - level) * velocity


def velocity_loss(velocity: Tensor, clean: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
    """Mean square error of a velocity, weighted by a map that broadcasts to it and has mean 1."""
    return (weight * (velocity - (noise - clean)).square()).mean()
