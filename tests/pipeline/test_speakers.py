"""Several speakers in one picture: their weights, and the drawn face twice, each with speech of its own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from export.compare import compare
from live_avatar.arrays import Array
from live_avatar.assets import SPEECH
from live_avatar.errors import InputError
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.graphs.contract import DIT
from live_avatar.pipeline.conditioning import Conditioner
from live_avatar.pipeline.denoiser import Denoiser, one_step
from live_avatar.pipeline.generator import Generator, cut_blocks
from live_avatar.runtime import Runtime
from live_avatar.runtime.onnx_runtime import OnnxRuntime
from live_avatar.runtime.torch_runtime import TorchRuntime
from live_avatar.weights.checkpoint import open_checkpoint
from live_avatar_client.media import read_speech
from tests.conftest import noise_speech
from tests.support.networks import SMALL, drawn_source, restreamed
from tests.support.speakers import LEFT, RIGHT, TWO, box_text, drawn_mask, mouth_motion, two_faces

TOKENS = SMALL.stream.frame_tokens
MASKS = (box_text(LEFT), drawn_mask(RIGHT))


def first_latents(runtime: Runtime, speech: Array, weights: Array | None) -> Array:
    """Latents of the first block after the first step."""
    conditioner, denoiser = Conditioner(runtime), Denoiser(runtime, one_step(1))
    given = conditioner.block(conditioner.open(3, weights), speech)
    state = denoiser.open(denoiser.prefill(drawn_source(runtime.preset, 1)))
    return denoiser.run(state, given.noise, given.audio)


@pytest.fixture(scope="module")
def alone(small_runtime: TorchRuntime) -> Array:
    return first_latents(small_runtime, noise_speech(0.48), None)


def of_two(runtime: Runtime, weights: list[float], other: Array) -> Array:
    spread = np.repeat(np.array(weights, np.float32)[:, None], TOKENS, axis=1)
    return first_latents(restreamed(runtime, speakers=2), np.stack([noise_speech(0.48), other]), spread)


def test_a_speaker_without_weight_is_not_there(small_runtime: TorchRuntime, alone: Array) -> None:
    """To the bit: what the other one says is multiplied by 0."""
    assert np.array_equal(of_two(small_runtime, [1, 0], noise_speech(0.48, seed=9)), alone)


def test_the_speech_of_everyone_counts(small_runtime: TorchRuntime, alone: Array) -> None:
    """Not so if the other one has weight, and less the less weight there is."""
    near, far = (
        np.abs(of_two(small_runtime, [1, weight], noise_speech(0.48, seed=9)) - alone).max() for weight in (0.1, 1)
    )
    assert 0 < near < far


def test_a_weight_moves_its_own_tokens_most(small_runtime: TorchRuntime, alone: Array) -> None:
    weights = np.ones((2, TOKENS), np.float32)
    weights[1] = 0
    weights[1, :4] = 1  # the first row of tokens
    speech = np.stack([noise_speech(0.48), noise_speech(0.48, seed=9)])
    moved = np.abs(first_latents(restreamed(small_runtime, speakers=2), speech, weights) - alone)
    assert moved[..., :2, :].mean() > 2 * moved[..., 2:, :].mean()


def test_a_whole_speech_of_several_is_cut_as_that_of_one() -> None:
    speech = np.arange(2 * 20_000, dtype=np.int16).reshape(2, -1)
    cut = list(cut_blocks(speech, TWO.stream))
    for speaker in range(2):
        alone = list(cut_blocks(speech[speaker], TWO.stream))
        assert np.array_equal(np.stack([block[speaker] for block in cut]), np.stack(alone))


@pytest.fixture(scope="module")
def generator(artifacts_of_two: Artifacts) -> Generator:
    return Generator(OnnxRuntime(artifacts_of_two))


@pytest.mark.slow
def test_the_graph_of_two_speakers_is_the_torch_component(artifacts_of_two: Artifacts) -> None:
    assert artifacts_of_two.contracts[DIT].inputs[1].shape[0] == 2
    found = list(compare(artifacts_of_two, open_checkpoint(TWO), 5, [DIT]))
    assert found
    for difference in found:
        assert difference.within, difference


def turns() -> Array:
    """The demo's speech for two seconds, said by the first speaker and then by the second."""
    said = read_speech(SPEECH)[: 2 * 16_000]
    half = said.size // 2
    return np.stack([np.where(np.arange(said.size) < half, said, 0), np.where(np.arange(said.size) < half, 0, said)])


def frames_of(generator: Generator, speech: Array) -> Array:
    blocks = generator.generate(two_faces(), "", 3, speech, MASKS)
    return np.concatenate([block.frames for block in blocks])


@pytest.mark.slow
def test_each_face_speaks_what_it_says(generator: Generator) -> None:
    """The mouth of who is silent moves no more than it does when nobody speaks."""
    speech = turns()
    frames, still = frames_of(generator, speech), frames_of(generator, np.zeros_like(speech))
    half = len(frames) // 2
    left, right = mouth_motion(frames, LEFT), mouth_motion(frames, RIGHT)
    rest = max(mouth_motion(still, box).mean() for box in (LEFT, RIGHT))
    first, second = slice(2, half - 4), slice(half + 4, None)
    assert left[first].mean() > 2 * rest
    assert right[second].mean() > 2 * rest
    assert right[first].mean() < 1.5 * rest
    assert left[second].mean() < 1.5 * rest


@pytest.fixture(scope="module")
def torch_generator() -> Generator:
    return Generator(TorchRuntime(open_checkpoint(TWO)))


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        ((), "0 masks came for artifacts of 2 speakers; give one for each speaker"),
        (MASKS[:1], "1 mask came for artifacts of 2 speakers"),
        ((*MASKS, *MASKS), "4 masks came for artifacts of 2 speakers"),
        ((MASKS[0], b"0,0,193,96"), "the mask of speaker 1 is the box 0,0,193,96, which leaves the picture of 192x96"),
    ],
)
def test_masks_that_do_not_fit_are_refused(torch_generator: Generator, masks: tuple[bytes, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        next(torch_generator.stream(two_faces(), "", 3, no_speech(), masks=masks))


def no_speech() -> Iterator[Array]:
    raise AssertionError("the masks are looked at first")
    yield


def test_one_speaker_takes_no_masks(onnx_runtime: OnnxRuntime, picture: bytes) -> None:
    with pytest.raises(InputError, match="2 masks came for artifacts of one speaker; leave the masks out"):
        next(Generator(onnx_runtime).stream(picture, "", 3, no_speech(), masks=MASKS))
