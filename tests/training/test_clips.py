"""Clips: lengths, determinism, and that blinks and sway owe nothing to the sound."""

import numpy as np
import pytest

from training.data.clips import BLINK, Split, make_clip, make_utterance
from training.data.clips import _lids as lids
from training.data.clips import _sway as sway

SIZE = 32


def silent_seed() -> int:
    return next(seed for seed in range(200) if not make_utterance(Split.TRAIN, seed, 1).speech.any())


@pytest.mark.parametrize("split", Split)
def test_the_same_seed_is_the_same_clip(split):
    first, again, other = (make_clip(split, seed, 2, SIZE) for seed in (5, 5, 6))
    for name in ("picture", "speech", "frames", "mouth"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert (first.prompt, first.attributes) == (again.prompt, again.attributes)
    assert not np.array_equal(first.frames, other.frames)


def test_a_clip_has_12_frames_for_each_block():
    clip = make_clip(Split.TEST, 0, 3, SIZE)
    assert (clip.frames.shape, clip.frames.dtype) == ((36, SIZE, SIZE, 3), np.uint8)
    assert (clip.speech.shape, clip.speech.dtype) == ((3 * 7_680,), np.int16)
    assert clip.mouth.shape == (36, 2)
    assert clip.picture.shape == (SIZE, SIZE, 3)
    assert set(clip.attributes) >= {"hair", "background", "clothes"}


def test_its_sound_is_the_utterance_of_the_same_seed():
    clip, utterance = make_clip(Split.VALIDATION, 2, 2, SIZE), make_utterance(Split.VALIDATION, 2, 2)
    np.testing.assert_array_equal(clip.speech, utterance.speech)
    np.testing.assert_array_equal(clip.mouth, utterance.mouth)


def test_the_looks_do_not_depend_on_the_length():
    short, long = (make_clip(Split.TRAIN, 7, blocks, SIZE) for blocks in (1, 2))
    np.testing.assert_array_equal(short.picture, long.picture)
    assert short.prompt == long.prompt


def test_a_silent_clip_begins_with_the_picture_and_then_lives():
    clip = make_clip(Split.TRAIN, silent_seed(), 4, SIZE)
    np.testing.assert_array_equal(clip.frames[0], clip.picture)
    assert (clip.frames[30] != clip.picture).any()


def test_sway_begins_at_rest_is_slow_and_stays_small():
    track = np.concatenate([sway(1000, np.random.default_rng(seed)) for seed in range(20)])
    assert not track[::1000].any()
    assert np.abs(track).max(0) == pytest.approx((1.6, 0.9, 2.2), rel=0.1)
    for seed in range(20):
        assert np.abs(np.diff(sway(1000, np.random.default_rng(seed)), axis=0)).max() < 0.3


def test_blinks_are_rare_short_and_never_at_the_start():
    tracks = np.stack([lids(2000, np.random.default_rng(seed)) for seed in range(20)])
    assert not tracks[:, :12].any()
    assert set(np.unique(tracks)) == {0.0, *BLINK}
    assert 0.02 < (tracks > 0).mean() < 0.15
