"""Noise, seeds and blocks of speech."""

from __future__ import annotations

import numpy as np
import pytest

from live_avatar.errors import InputError
from live_avatar.pipeline.conditioning import MAX_SEED, Conditioner, block_noise
from live_avatar.runtime.torch_runtime import TorchRuntime
from tests.conftest import noise_speech
from tests.support.networks import SMALL

SHAPE = (1, *SMALL.stream.latent_shape)
FROZEN_NOISE = [[0.01995942369, -0.670949161, 0.477350950], [0.739586890, 1.050400734, 0.525427043]]


@pytest.fixture(scope="module")
def conditioner(small_runtime: TorchRuntime) -> Conditioner:
    return Conditioner(small_runtime)


def test_noise_is_a_pure_function_of_seed_and_block() -> None:
    asked = [(seed, block) for seed in (0, 1, MAX_SEED) for block in (0, 1, 10**9)]
    first = {key: block_noise(*key, SHAPE) for key in asked}
    again = {key: block_noise(*key, SHAPE) for key in reversed(asked)}
    assert all(np.array_equal(first[key], again[key]) for key in asked)
    assert len({noise.tobytes() for noise in first.values()}) == len(asked)


def test_noise_is_what_it_has_always_been() -> None:
    """Frozen numbers: a new numpy that draws differently would silently change every video of a given seed."""
    noise = block_noise(420, 3, (2, 3))
    assert noise.dtype == np.float32
    np.testing.assert_allclose(noise, FROZEN_NOISE, rtol=1e-6)


def test_noise_is_unit_gaussian_and_blocks_are_unrelated() -> None:
    one, other = (block_noise(5, block, (100_000,)).astype(np.float64) for block in (0, 1))
    for noise in (one, other):
        assert abs(noise.mean()) < 0.02
        assert abs(noise.var() - 1) < 0.02
        assert 0.68 < (abs(noise) < 1).mean() < 0.69
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.02


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_a_seed_out_of_range_is_refused(conditioner: Conditioner, seed: int) -> None:
    with pytest.raises(InputError, match=rf"seed {seed} is outside 0\.\.9223372036854775807; choose one inside\."):
        conditioner.open(seed)


@pytest.mark.parametrize("seed", [0, MAX_SEED])
def test_every_seed_in_range_opens(conditioner: Conditioner, seed: int) -> None:
    assert conditioner.open(seed).seed == seed


def test_blocks_count_and_two_sessions_do_not_meet(conditioner: Conditioner) -> None:
    speech = [noise_speech(0.48, seed=number) for number in range(4)]
    one, other = conditioner.open(1), conditioner.open(2)
    alone = conditioner.open(1)
    expected = [conditioner.block(alone, samples) for samples in speech]
    for number, samples in enumerate(speech):
        made = conditioner.block(one, samples)
        different = conditioner.block(other, speech[-1 - number])
        assert (made.index, made.first_frame) == (number, 12 * number)
        assert made.noise.shape == SHAPE
        assert np.array_equal(made.noise, expected[number].noise)
        assert not np.array_equal(made.noise, different.noise)
        for name, tokens in made.audio.items():
            assert np.array_equal(tokens, expected[number].audio[name])
            assert not np.array_equal(tokens, different.audio[name])


def test_a_refused_block_is_not_counted(conditioner: Conditioner) -> None:
    state = conditioner.open(1)
    with pytest.raises(InputError, match="a block of speech is"):
        conditioner.block(state, np.zeros(5, dtype=np.int16))
    assert conditioner.block(state, noise_speech(0.48)).index == 0
