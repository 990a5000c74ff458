"""A whole stream on the torch runtime: how many frames, which bits, and what depends on what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from live_avatar.arrays import Array
from live_avatar.errors import InputError
from live_avatar.pipeline.generator import GeneratedBlock, Generator, cut_blocks
from live_avatar.runtime.torch_runtime import TorchRuntime
from tests.conftest import SEED, noise_speech
from tests.support.networks import SMALL, restreamed

PROMPT = "A person talks."
BLOCK_S = 0.48
BLOCK = SMALL.stream.block_samples


@pytest.fixture(scope="module")
def generator(small_runtime: TorchRuntime) -> Generator:
    return Generator(small_runtime)


def made(generator: Generator, picture: bytes, speech: Array, seed: int = SEED) -> list[GeneratedBlock]:
    return list(generator.generate(picture, PROMPT, seed, speech))


def frame_count(blocks: list[GeneratedBlock]) -> int:
    """Number of frames, having checked that they follow one another from 0 on."""
    total = 0
    for block in blocks:
        assert block.first_frame == total
        assert block.frames.dtype == np.uint8
        assert block.frames.shape[1:] == (64, 64, 3)
        total += len(block.frames)
    return total


def same_blocks(one: list[GeneratedBlock], other: list[GeneratedBlock]) -> list[bool]:
    return [
        np.array_equal(a.latents, b.latents) and np.array_equal(a.frames, b.frames)
        for a, b in zip(one, other, strict=True)
    ]


@pytest.fixture(scope="module")
def speech() -> Array:
    return noise_speech(6 * BLOCK_S)


@pytest.fixture(scope="module")
def never_replaced(small_runtime: TorchRuntime, picture: bytes, speech: Array) -> list[GeneratedBlock]:
    """Six blocks whose sink stays the reference image."""
    return made(Generator(restreamed(small_runtime, sink_update_block=None)), picture, speech)


@pytest.mark.parametrize(
    ("samples", "frames"),
    [(1, 1), (160, 1), (640, 1), (641, 2), (BLOCK, 12), (BLOCK + 1, 13), (2 * BLOCK, 24)],
)
def test_there_is_one_frame_per_started_40_ms(generator: Generator, picture: bytes, samples: int, frames: int) -> None:
    assert frame_count(made(generator, picture, noise_speech(1)[:samples])) == frames


@pytest.mark.parametrize("lookahead_ms", [40, 120, 480, 520])
def test_lookahead_changes_neither_the_count_nor_the_start(
    small_runtime: TorchRuntime, picture: bytes, lookahead_ms: int
) -> None:
    generator = Generator(restreamed(small_runtime, lookahead_ms=lookahead_ms))
    assert frame_count(made(generator, picture, noise_speech(1)[: BLOCK + 1])) == 13


@pytest.mark.parametrize("lookahead_frames", [0, 3, 12, 13])
@pytest.mark.parametrize("samples", [1, 640, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK - 640, 5 * BLOCK])
def test_speech_is_cut_into_just_enough_blocks(samples: int, lookahead_frames: int) -> None:
    stream = replace(SMALL.stream, lookahead_ms=40 * lookahead_frames)
    speech = noise_speech(3)[:samples]
    blocks = list(cut_blocks(speech, stream))
    assert all(block.shape == (BLOCK,) and block.dtype == np.int16 for block in blocks)
    joined = np.concatenate(blocks)
    assert np.array_equal(joined[:samples], speech)
    assert not joined[samples:].any()
    needed = -(-samples // 640) + lookahead_frames
    assert 12 * (len(blocks) - 1) < needed <= 12 * len(blocks)


def test_an_empty_speech_is_refused(generator: Generator, picture: bytes) -> None:
    with pytest.raises(InputError, match=r"the speech has 0 samples; there is nothing to say\."):
        next(generator.generate(picture, PROMPT, SEED, np.zeros(0, dtype=np.int16)))


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_video(
    generator: Generator, picture: bytes, speech: Array
) -> None:
    two = speech[: 2 * BLOCK]
    first = made(generator, picture, two)
    assert same_blocks(first, made(generator, picture, two)) == [True, True]
    assert same_blocks(first, made(generator, picture, two, seed=SEED + 1)) == [False, False]


def test_sessions_in_turn_equal_sessions_one_after_another(generator: Generator, picture: bytes, speech: Array) -> None:
    speeches = [speech[: 2 * BLOCK], speech[3 * BLOCK : 5 * BLOCK]]
    alone = [made(generator, picture, one, seed) for seed, one in enumerate(speeches)]
    both = [generator.generate(picture, PROMPT, seed, one) for seed, one in enumerate(speeches)]
    turns = list(zip(*both, strict=True))
    for number, blocks in enumerate(alone):
        assert same_blocks([turn[number] for turn in turns], blocks) == [True, True]


def test_blocks_do_not_depend_on_later_speech(generator: Generator, picture: bytes, speech: Array) -> None:
    changed = speech[: 3 * BLOCK].copy()
    changed[2 * BLOCK :] = noise_speech(BLOCK_S, seed=99)
    before, after = made(generator, picture, speech[: 3 * BLOCK]), made(generator, picture, changed)
    assert same_blocks(before, after) == [True, True, False]


def test_what_is_asked_for_is_all_that_is_made(generator: Generator, picture: bytes, speech: Array) -> None:
    """A stream takes a block of speech only when its frames are wanted, so it can go on for ever."""
    taken = 0

    def endless() -> Iterator[Array]:
        nonlocal taken
        while True:
            taken += 1
            yield speech[:BLOCK]

    stream = generator.stream(picture, PROMPT, SEED, endless())
    assert [next(stream).index for _ in range(2)] == [0, 1]
    assert taken == 2


@pytest.mark.parametrize("update", [2, 5])
def test_the_replaced_sink_takes_effect_at_its_block_and_not_before(
    small_runtime: TorchRuntime,
    picture: bytes,
    speech: Array,
    never_replaced: list[GeneratedBlock],
    update: int,
) -> None:
    blocks = made(Generator(restreamed(small_runtime, sink_update_block=update)), picture, speech)
    assert same_blocks(blocks, never_replaced) == [block < update - 1 for block in range(6)]


def test_the_sinks_distance_can_be_drawn_per_call(generator: Generator, picture: bytes, speech: Array) -> None:
    """As the released code does; blocks at whose position the draw makes no difference stay the same."""
    asked: list[tuple[int, int]] = []

    def distance(block: int, step: int) -> int:
        asked.append((block, step))
        return 10

    blocks = cut_blocks(speech[: 2 * BLOCK], SMALL.stream)
    drawn = list(generator.stream(picture, PROMPT, SEED, blocks, distance))
    assert asked == [(block, step) for block in range(2) for step in (1, 2, 3, 4)]
    fixed = made(generator, picture, speech[: 2 * BLOCK])
    assert same_blocks(drawn, fixed) == [True, False]


def test_frames_move_with_the_speech(generator: Generator, picture: bytes, speech: Array) -> None:
    """Not a still picture, and not the picture that came in: the network has its say in every frame."""
    block = made(generator, picture, speech[:BLOCK])[0]
    steps = np.abs(np.diff(block.frames.astype(int), axis=0)).mean(axis=(1, 2, 3))
    assert (steps > 0).all()
    assert np.isfinite(block.latents).all()
