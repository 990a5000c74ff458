"""Flow matching against the released sampler's own numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from live_avatar.config import TINY
from live_avatar.model.schedule import make_schedule
from tests.tolerances import FLOAT32
from training.flow import chance, choice, mixed, moved, timestep, training_levels, velocity_loss

SHAPE = (1, 16, 3, 8, 8)


@pytest.fixture
def clean(draw: torch.Generator) -> torch.Tensor:
    return torch.randn(SHAPE, generator=draw)


@pytest.fixture
def noise(draw: torch.Generator) -> torch.Tensor:
    return torch.randn(SHAPE, generator=draw)


@pytest.mark.parametrize("steps", [1, 3, 4, 40])
def test_the_samplers_steps_with_the_true_velocity_end_at_the_clean_latents(
    clean: torch.Tensor, noise: torch.Tensor, steps: int
) -> None:
    schedule = make_schedule(TINY.with_stream(steps=steps).stream)
    latent = noise.numpy()
    for step in range(steps):
        latent = schedule.euler(step, latent, (noise - clean).numpy())
    assert np.abs(latent - clean.numpy()).max() <= FLOAT32


def test_one_step_of_ours_is_one_of_the_samplers(clean: torch.Tensor, noise: torch.Tensor) -> None:
    schedule = make_schedule(TINY.stream)
    for step, (level, to) in enumerate(zip(schedule.sigmas, schedule.sigmas[1:], strict=False)):
        theirs = schedule.euler(step, clean.numpy(), noise.numpy())
        assert np.abs(moved(clean, noise, level, to).numpy() - theirs).max() <= FLOAT32


def test_a_level_is_the_share_of_noise(clean: torch.Tensor, noise: torch.Tensor) -> None:
    assert torch.equal(mixed(clean, noise, 0.0), clean)
    assert torch.equal(mixed(clean, noise, 1.0), noise)
    noisy = mixed(clean, noise, 0.3)
    assert (moved(noisy, noise - clean, 0.3, 0.0) - clean).abs().max() <= FLOAT32
    assert (moved(noisy, noise - clean, 0.3, 0.9) - mixed(clean, noise, 0.9)).abs().max() <= FLOAT32


def test_the_network_hears_the_samplers_timesteps() -> None:
    schedule = make_schedule(TINY.stream)
    assert tuple(timestep(level) for level in schedule.sigmas[:-1]) == schedule.timesteps


def test_training_levels_are_the_schedules_own_and_three_quarters_are_high() -> None:
    levels = training_levels(TINY.with_stream(steps=2, sigmas=(1.0, 0.5, 0.0)).stream)
    assert len(levels) == 1000
    assert levels[0] == 1.0
    assert levels[-1] == make_schedule(TINY.stream).sigmas[-2]
    assert sum(level > 0.5 for level in levels) / 1000 == pytest.approx(0.75, abs=0.01)


def test_the_loss_weighs_latents_by_the_map(clean: torch.Tensor, noise: torch.Tensor) -> None:
    weight = torch.ones(1, 1, 1, 8, 8)
    weight[..., :4] = 0.5
    weight[..., 4:] = 1.5
    true = noise - clean
    assert velocity_loss(true, clean, noise, weight) == 0
    wrong = true.clone()
    wrong[..., 4:] += 2
    assert float(velocity_loss(wrong, clean, noise, weight)) == pytest.approx(0.5 * 1.5 * 4, rel=1e-5)


def test_draws_are_the_generators(draw: torch.Generator) -> None:
    taken = [chance(0.25, draw) for _ in range(2000)]
    assert 0.2 < sum(taken) / 2000 < 0.3
    assert not any(chance(0.0, draw) for _ in range(100))
    assert {choice([0.1, 0.2, 0.3], draw) for _ in range(100)} == {0.1, 0.2, 0.3}
