"""The sampler's numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from live_avatar.arrays import Array
from live_avatar.config import MOTION_LATENTS, TINY, StreamConfig
from live_avatar.errors import ConfigError
from live_avatar.model.schedule import make_schedule, without_idle_step
from live_avatar.pipeline.denoiser import Denoiser, all_steps
from live_avatar.pipeline.sink import SinkSource
from live_avatar.runtime import Runtime
from live_avatar.runtime.torch_runtime import TorchRuntime
from live_avatar.weights.checkpoint import load_networks, open_checkpoint

# The released schedule of four steps, as the spec prints it (float32).
SIGMAS = (1.0, 0.857692301273346, 0.602150559425354, 0.008928571827709675, 0.0)
TIMESTEPS = (1000.0, 857.6923217773438, 602.1505737304688, 8.928571701049805)
DELTAS = (-0.1423076987, -0.2555417418, -0.5932219876, -0.0089285718)


def stream_of(steps: int, sigmas: tuple[float, ...] | None = None) -> StreamConfig:
    return dataclasses.replace(TINY.stream, steps=steps, sigmas=sigmas)


def test_the_released_schedule_to_the_bit() -> None:
    schedule = make_schedule(TINY.stream)
    assert schedule.sigmas == SIGMAS
    assert schedule.timesteps == TIMESTEPS
    assert schedule.steps == 4


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 50])
def test_any_number_of_steps_falls_from_noise_to_nothing(steps: int) -> None:
    schedule = make_schedule(stream_of(steps))
    assert schedule.steps == len(schedule.timesteps) == steps
    assert schedule.sigmas[0] == 1.0
    assert schedule.sigmas[-1] == 0.0
    assert list(schedule.sigmas) == sorted(set(schedule.sigmas), reverse=True)


def test_without_shift_the_steps_are_equal() -> None:
    sigmas = np.array(make_schedule(dataclasses.replace(TINY.stream, schedule_shift=1.0)).sigmas[:-1])
    np.testing.assert_allclose(sigmas, np.linspace(1, 0.001, 4), rtol=1e-6)


def test_a_streams_own_noise_levels() -> None:
    schedule = make_schedule(stream_of(2, (0.9, 0.25, 0.0)))
    assert schedule.sigmas == (0.9, 0.25, 0.0)
    assert schedule.timesteps == (float(np.float32(1000) * np.float32(0.9)), 250.0)


@pytest.mark.parametrize("step", range(4))
def test_an_euler_step_in_float32(step: int) -> None:
    schedule = make_schedule(TINY.stream)
    latent, velocity = np.float32([1.0, -2.0]), np.float32([3.0, 0.5])
    moved = schedule.euler(step, latent, velocity)
    assert moved.dtype == np.float32
    np.testing.assert_allclose(moved, latent + DELTAS[step] * velocity, rtol=1e-6)


@pytest.mark.parametrize("stream", [TINY.stream, stream_of(1), without_idle_step(TINY.stream)])
def test_the_true_velocity_leads_from_noise_to_data(stream: StreamConfig) -> None:
    schedule = make_schedule(stream)
    noise, data = np.float32([0.3, -1.7]), np.float32([2.0, 0.1])
    latent = noise
    for step in range(schedule.steps):
        latent = schedule.euler(step, latent, noise - data)
    np.testing.assert_allclose(latent, data, rtol=1e-5)


def test_the_idle_step_is_folded_into_the_one_before() -> None:
    folded = without_idle_step(TINY.stream)
    assert folded.steps == 3
    assert folded.sigmas == (*SIGMAS[:3], 0.0)
    assert make_schedule(folded).timesteps == TIMESTEPS[:3], "the other steps keep their noise levels"
    assert folded.sigmas[3] - folded.sigmas[2] == (SIGMAS[3] - SIGMAS[2]) + (SIGMAS[4] - SIGMAS[3])
    assert dataclasses.replace(folded, steps=4, sigmas=None) == TINY.stream


def test_the_last_of_one_step_cannot_be_dropped() -> None:
    once = without_idle_step(stream_of(2))
    assert once.sigmas == (1.0, 0.0)
    with pytest.raises(ConfigError, match=r"a schedule of 1 step has no step to drop; give it at least 2\."):
        without_idle_step(once)


def denoised(runtime: Runtime) -> Array:
    """Clean latents [1, 16, F, h, w] of one block of noise, with zeros for pictures, text and speech."""
    stream, dit = runtime.preset.stream, runtime.preset.dit
    channels, frames, height, width = stream.latent_shape
    source = SinkSource(
        zeros(1, channels, 1, height, width),
        zeros(1, channels, MOTION_LATENTS, height, width),
        zeros(dit.text_len, dit.text_dim),
    )
    audio = {
        "audio_local": zeros(1, frames, dit.num_audio_token + 1, dit.dim),
        "audio_global": zeros(1, frames, dit.dim),
        "audio_weight": np.ones((1, frames, stream.frame_tokens), dtype=np.float32),
    }
    latent = np.random.default_rng(3).standard_normal((1, *stream.latent_shape), dtype=np.float32)
    denoiser = Denoiser(runtime, all_steps(stream.steps))
    return denoiser.run(denoiser.open(denoiser.prefill(source)), latent, audio)


def test_every_step_has_the_modulation_of_its_own_noise_level() -> None:
    preset = dataclasses.replace(TINY, stream=without_idle_step(TINY.stream))
    checkpoint = open_checkpoint(preset)
    runtime, networks = TorchRuntime(checkpoint), load_networks(checkpoint)
    for step, timestep in enumerate((0.0, *TIMESTEPS[:3])):
        given, expected = runtime.modulation(step), networks.dit.modulation(timestep)
        assert np.array_equal(given["modulation"], expected.layers.detach())
        assert np.array_equal(given["head_modulation"], expected.head.detach())


def zeros(*shape: int) -> Array:
    return np.zeros(shape, dtype=np.float32)


@pytest.mark.slow
def test_the_released_noise_levels_given_by_hand_are_the_same_bits(torch_runtime: TorchRuntime) -> None:
    expected = denoised(torch_runtime)
    for sigmas, same in ((SIGMAS, True), ((*SIGMAS[:2], 0.6, *SIGMAS[3:]), False)):
        runtime = TorchRuntime(open_checkpoint(TINY.with_stream(sigmas=sigmas)))
        assert np.array_equal(denoised(runtime), expected) == same
