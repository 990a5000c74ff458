"""The sampler's numbers."""

from __future__ import annotations

import numpy as np
import pytest

from live_avatar.errors import ConfigError
from live_avatar.schedule import Schedule, make_schedule

# The released schedule of four steps, as the spec prints it (float32).
SIGMAS = (1.0, 0.857692301273346, 0.602150559425354, 0.008928571827709675, 0.0)
TIMESTEPS = (1000.0, 857.6923217773438, 602.1505737304688, 8.928571701049805)
DELTAS = (-0.1423076987, -0.2555417418, -0.5932219876, -0.0089285718)


def test_the_released_schedule_to_the_bit() -> None:
    schedule = make_schedule(4, shift=3.0)
    assert schedule.sigmas == SIGMAS
    assert schedule.timesteps == TIMESTEPS
    assert schedule.steps == 4


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 50])
def test_any_number_of_steps_falls_from_noise_to_nothing(steps: int) -> None:
    schedule = make_schedule(steps, shift=3.0)
    assert schedule.steps == len(schedule.timesteps) == steps
    assert schedule.sigmas[0] == 1.0
    assert schedule.sigmas[-1] == 0.0


def test_without_shift_the_steps_are_equal() -> None:
    sigmas = np.array(make_schedule(4, shift=1.0).sigmas[:-1])
    np.testing.assert_allclose(sigmas, np.linspace(1, 0.001, 4), rtol=1e-6)


@pytest.mark.parametrize("step", range(4))
def test_an_euler_step_in_float32(step: int) -> None:
    schedule = make_schedule(4, shift=3.0)
    latent, velocity = np.float32([1.0, -2.0]), np.float32([3.0, 0.5])
    moved = schedule.euler(step, latent, velocity)
    assert moved.dtype == np.float32
    np.testing.assert_allclose(moved, latent + DELTAS[step] * velocity, rtol=1e-6)


def test_the_true_velocity_leads_from_noise_to_data() -> None:
    schedule = make_schedule(4, shift=3.0)
    noise, data = np.float32([0.3, -1.7]), np.float32([2.0, 0.1])
    latent = noise
    for step in range(4):
        latent = schedule.euler(step, latent, noise - data)
    np.testing.assert_allclose(latent, data, rtol=1e-5)


@pytest.mark.parametrize(
    "sigmas", [(), (0.0,), (1.0,), (1.0, 0.5), (0.5, 0.7, 0.0), (0.5, 0.5, 0.0), (1.1, 0.0), (1.0, 0.0, -0.1)]
)
def test_sigmas_that_do_not_fall_to_zero_are_refused(sigmas: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"sigmas \(.*\) must fall from at most 1 to exactly 0; give at least two\."):
        Schedule(sigmas)
