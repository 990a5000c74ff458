"""Noise, seeds and blocks of speech."""

from __future__ import annotations

import numpy as np
import pytest

from live_avatar.arrays import Array, Arrays
from live_avatar.errors import InputError
from live_avatar.pipeline.conditioning import MAX_SEED, BlockInput, Conditioner, block_noise
from live_avatar.pipeline.lru import LRU
from live_avatar.runtime import Graph
from live_avatar.runtime.torch_runtime import TorchRuntime
from tests.conftest import noise_speech
from tests.support.networks import SMALL, restreamed

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
            assert np.array_equal(tokens, different.audio[name]) == (name == "audio_weight")


def test_a_refused_block_is_not_counted(conditioner: Conditioner) -> None:
    state = conditioner.open(1)
    with pytest.raises(InputError, match="a block of speech is"):
        conditioner.block(state, np.zeros(5, dtype=np.int16))
    assert conditioner.block(state, noise_speech(0.48)).index == 0


class Counted:
    """A graph that counts its runs."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.runs = 0

    def run(self, inputs: Arrays) -> dict[str, Array]:
        self.runs += 1
        return self._graph.run(inputs)


def two_speakers(runtime: TorchRuntime) -> tuple[Conditioner, Counted]:
    """A conditioner of two speakers, and its speech encoder."""
    conditioner = Conditioner(restreamed(runtime, speakers=2))
    counted = conditioner._graphs["speech_encoder"] = Counted(conditioner._graphs["speech_encoder"])
    return conditioner, counted


WEIGHTS = np.linspace(0, 1, 2 * SMALL.stream.frame_tokens, dtype=np.float32).reshape(2, -1)
SILENCE = np.zeros(SMALL.stream.block_samples, dtype=np.int16)


def blocks_of(conditioner: Conditioner, speech: list[Array], weights: Array | None = WEIGHTS) -> list[BlockInput]:
    state = conditioner.open(1, weights)
    return [conditioner.block(state, samples) for samples in speech]


def test_each_speaker_has_a_window_of_his_own(small_runtime: TorchRuntime, conditioner: Conditioner) -> None:
    """Who speaks beside another one has the tokens of who speaks alone."""
    speech = [np.stack([noise_speech(0.48, seed=2 * i), noise_speech(0.48, seed=2 * i + 1)]) for i in range(5)]
    made = blocks_of(two_speakers(small_runtime)[0], speech)
    alone = [blocks_of(conditioner, [samples[speaker] for samples in speech], None) for speaker in range(2)]
    for i, block in enumerate(made):
        for name in ("audio_local", "audio_global"):
            assert np.array_equal(block.audio[name], np.concatenate([own[i].audio[name] for own in alone]))
        assert np.array_equal(block.audio["audio_weight"], np.stack([WEIGHTS] * 3, axis=1))


def test_a_speaker_who_is_silent_costs_no_run_of_the_speech_encoder(small_runtime: TorchRuntime) -> None:
    conditioner, encoder = two_speakers(small_runtime)
    speech = [np.stack([noise_speech(0.48, seed=i), SILENCE]) for i in range(6)]
    first = blocks_of(conditioner, speech)
    encoder.runs = 0
    again = blocks_of(conditioner, speech)
    assert encoder.runs == len(speech)
    for one, other in zip(first, again, strict=True):
        for name, tokens in one.audio.items():
            assert np.array_equal(tokens, other.audio[name])


def test_remembered_silence_equals_silence_that_is_encoded(small_runtime: TorchRuntime) -> None:
    speech = [np.stack([SILENCE, SILENCE])] * 12  # the frames lie as those of five blocks before
    conditioner, encoder = two_speakers(small_runtime)
    remembered = blocks_of(conditioner, speech)
    assert encoder.runs == SMALL.stream.speech_window_blocks - 1 + 5
    conditioner._silences = LRU(0)
    encoded = blocks_of(conditioner, speech)
    for one, other in zip(remembered, encoded, strict=True):
        for name, tokens in one.audio.items():
            assert np.array_equal(tokens, other.audio[name])


def test_a_speaker_who_has_spoken_costs_nothing_when_his_window_is_silent(small_runtime: TorchRuntime) -> None:
    conditioner, encoder = two_speakers(small_runtime)
    said = [np.stack([SILENCE, noise_speech(0.48)])] + [np.stack([SILENCE, SILENCE])] * 7
    blocks_of(conditioner, said)
    encoder.runs = 0
    blocks_of(conditioner, said)
    assert encoder.runs == SMALL.stream.speech_window_blocks


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (None, r"are missing; expected \[2, 16\], made of their masks"),
        (WEIGHTS[:1], r"are \[1, 16\]; expected \[2, 16\]"),
        (WEIGHTS[:, :9], r"are \[2, 9\]; expected \[2, 16\]"),
    ],
)
def test_weights_of_another_shape_are_refused(small_runtime: TorchRuntime, weights: Array | None, words: str) -> None:
    with pytest.raises(InputError, match=f"the weights of the speakers {words}"):
        two_speakers(small_runtime)[0].open(1, weights)


def test_a_block_that_lacks_a_speaker_changes_nothing(small_runtime: TorchRuntime) -> None:
    conditioner, _ = two_speakers(small_runtime)
    state = conditioner.open(1, WEIGHTS)
    for samples in (SILENCE, np.zeros((1, SILENCE.size), np.int16), np.zeros((2, 5), np.int16)):
        with pytest.raises(InputError, match=r"expected int16 \[2, 7680\], 16 kHz mono of each speaker"):
            conditioner.block(state, samples)
    assert conditioner.block(state, np.stack([SILENCE, SILENCE])).index == 0
