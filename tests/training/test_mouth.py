"""What is measured in frames against the truth they were drawn from."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from live_avatar.errors import InputError
from training.data.clips import Clip, Split, make_clip
from training.mouth import best_lag, correlation, looks_distance, measure_mouth

OPENING, WIDTH = 0, 1


def talking(count: int) -> list[Clip]:
    """Clips of test identities in which someone speaks."""
    clips = (make_clip(Split.TEST, seed, 3) for seed in range(100))
    return [clip for clip, _ in zip((one for one in clips if one.mouth[:, 0].std() > 0.1), range(count), strict=False)]


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return talking(12)


def degraded(frames: np.ndarray) -> np.ndarray:
    """As a poor decoder might: a blur of 1 px and noise of 4 levels."""
    blurred = [np.asarray(Image.fromarray(frame).filter(ImageFilter.GaussianBlur(1))) for frame in frames]
    noise = np.random.default_rng(0).normal(0, 4, frames.shape)
    return np.clip(np.rint(np.stack(blurred) + noise), 0, 255).astype(np.uint8)


def correlations(clips: list[Clip], frames: list[np.ndarray], which: int) -> list[float]:
    return [
        correlation(measure_mouth(seen, clip.picture)[:, which], clip.mouth[:, which])
        for clip, seen in zip(clips, frames, strict=True)
    ]


def test_the_measured_opening_is_the_true_one_over_many_identities(clips):
    found = correlations(clips, [clip.frames for clip in clips], OPENING)
    assert min(found) > 0.97
    assert np.mean(found) > 0.99


def test_the_opening_survives_blur_and_noise(clips):
    found = correlations(clips, [degraded(clip.frames) for clip in clips], OPENING)
    assert min(found) > 0.93
    assert np.mean(found) > 0.97


def test_the_measured_width_follows_the_true_one(clips):
    assert np.mean(correlations(clips, [clip.frames for clip in clips], WIDTH)) > 0.9


def test_the_scale_is_that_of_the_truth(clips):
    measured = np.concatenate([measure_mouth(clip.frames, clip.picture) for clip in clips])
    truth = np.concatenate([clip.mouth for clip in clips])
    assert np.abs(measured - truth).mean(0).max() < 0.08


def test_a_shut_mouth_measures_zero(clips):
    still = np.stack([clips[0].picture] * 3)
    np.testing.assert_allclose(measure_mouth(still, clips[0].picture)[:, OPENING], 0, atol=1e-6)


def test_another_size_measures_alike():
    clip = next(
        clip for clip in (make_clip(Split.TEST, seed, 2, 128) for seed in range(20)) if clip.mouth[:, 0].std() > 0.1
    )
    measured = measure_mouth(clip.frames, clip.picture)
    assert correlation(measured[:, OPENING], clip.mouth[:, OPENING]) > 0.97
    assert np.abs(measured[:, OPENING] - clip.mouth[:, OPENING]).mean() < 0.08


def test_the_best_lag_is_found_with_its_sign():
    truth = np.random.default_rng(0).normal(size=200)
    assert best_lag(np.roll(truth, 3), truth, range(-5, 6)) == 3
    assert best_lag(np.roll(truth, -2), truth, range(-5, 6)) == -2
    assert correlation(np.roll(truth, 3), truth, 3) == pytest.approx(1.0)
    assert correlation(-truth, truth) == pytest.approx(-1.0)
    assert abs(correlation(np.roll(truth, 3), truth)) < 0.3


def test_a_constant_series_correlates_with_nothing():
    assert correlation(np.zeros(10), np.arange(10.0)) == 0.0


def test_looks_are_near_the_own_picture_and_far_from_anothers(clips):
    own = [looks_distance(clip.frames, clip.picture).mean() for clip in clips]
    others = [looks_distance(clip.frames, clips[index - 1].picture).mean() for index, clip in enumerate(clips)]
    assert max(own) < 3
    assert min(others) > 5 * max(own)


def test_looks_measure_a_drift_of_colour(clips):
    clip = clips[0]
    redder = np.clip(clip.frames + np.array([12, 0, 0]), 0, 255).astype(np.uint8)
    assert 6 < looks_distance(redder, clip.picture).mean() < 14


@pytest.mark.parametrize(
    ("frames", "picture"),
    [
        (np.zeros((2, 96, 96, 3), np.uint8), np.zeros((64, 64, 3), np.uint8)),
        (np.zeros((96, 96, 3), np.uint8), np.zeros((96, 96, 3), np.uint8)),
        (np.zeros((2, 96, 96, 3), np.float32), np.zeros((96, 96, 3), np.uint8)),
    ],
)
@pytest.mark.parametrize("measure", [measure_mouth, looks_distance])
def test_frames_of_another_shape_are_refused(measure, frames, picture):
    with pytest.raises(InputError, match=r"expected uint8 \[n, H, W, 3\] and \[H, W, 3\] of the same sides"):
        measure(frames, picture)


def test_series_of_other_lengths_are_refused():
    with pytest.raises(
        InputError, match=r"shapes \[5\] and \[6\]; expected two of the same length, at least 2 for lag 0"
    ):
        correlation(np.zeros(5), np.zeros(6))
