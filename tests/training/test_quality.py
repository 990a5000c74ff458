"""Measures without weights against independent computations, and on videos whose order is known."""

from __future__ import annotations

import numpy as np
import pytest

from live_avatar.arrays import Array
from live_avatar.errors import InputError
from training.data.clips import Split, make_clip
from training.videos.measures import loudness, mouth_correlation, small_grey
from training.videos.quality import SAME_DB, Moments, colour_drift, frechet, looks_likeness, psnr, ssim


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_psnr_is_that_of_a_known_error() -> None:
    frames = np.full((3, 16, 16, 3), 100, np.uint8)
    assert psnr(frames + np.uint8(5), frames) == pytest.approx(20 * np.log10(255 / 5))
    assert psnr(frames, frames) == SAME_DB


def test_ssim_equals_a_plain_computation_window_by_window() -> None:
    ours, theirs = noise(1, 16, 14, 3), noise(1, 16, 14, 3, seed=1)
    a, b = (frames[0] @ np.array([0.299, 0.587, 0.114]) for frames in (ours, theirs))
    at = np.arange(11) - 5
    window = np.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for top in range(6):
        for left in range(4):
            x, y = a[top : top + 11, left : left + 11], b[top : top + 11, left : left + 11]
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy, vxy = (
                (window * p * q).sum() - m * n for p, q, m, n in ((x, x, mx, mx), (y, y, my, my), (x, y, mx, my))
            )
            c1, c2 = 2.55**2, 7.65**2
            values.append((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    assert ssim(ours, theirs) == pytest.approx(np.mean(values), abs=1e-9)
    assert ssim(ours, ours) == pytest.approx(1.0)


def test_frechet_is_the_closed_form_of_axes_that_agree() -> None:
    """For covariances that share their axes it is the sum of (m1 - m2)^2 + (s1 - s2)^2 over the axes."""
    random = np.random.default_rng(3)
    axes, _ = np.linalg.qr(random.standard_normal((4, 4)))
    plain = np.linalg.qr(random.standard_normal((50, 4)) - 0)[0]
    plain -= plain.mean(0)
    plain = np.linalg.qr(plain)[0] * np.sqrt(49)  # covariance 1, mean 0
    spreads, means = random.uniform(0.5, 2, (2, 4)), random.standard_normal((2, 4))
    sets = []
    for spread, mean in zip(spreads, means, strict=True):
        moments = Moments()
        features = (plain * spread) @ axes.T + mean
        moments.add(features[:20])
        moments.add(features[20:])
        sets.append(moments)
    expected = np.square(means[0] - means[1]).sum() + np.square(spreads[0] - spreads[1]).sum()
    assert frechet(*sets) == pytest.approx(expected, rel=1e-9)
    assert frechet(sets[0], sets[0]) == pytest.approx(0, abs=1e-9)


def test_frechet_of_any_covariances_equals_the_general_root() -> None:
    """The trace of (C1 C2)^(1/2) from the eigenvalues of the product itself, which is not symmetric."""
    random = np.random.default_rng(5)
    sets = []
    for _ in range(2):
        moments = Moments()
        moments.add(random.standard_normal((40, 6)) @ random.standard_normal((6, 6)) + random.standard_normal(6))
        sets.append(moments)
    (m1, c1), (m2, c2) = (one.gaussian() for one in sets)
    root = np.sqrt(np.linalg.eigvals(c1 @ c2).astype(complex)).real.sum()
    expected = np.square(m1 - m2).sum() + np.trace(c1) + np.trace(c2) - 2 * root
    assert frechet(*sets) == pytest.approx(expected, rel=1e-9)


def test_moments_of_one_feature_are_refused() -> None:
    moments = Moments()
    moments.add(np.zeros((1, 3)))
    with pytest.raises(InputError, match=r"1 features have no covariance; give longer or more videos\."):
        moments.gaussian()


def test_drift_is_0_for_the_picture_and_grows_with_the_change() -> None:
    clip = make_clip(Split.TEST, 0, 1)
    frames = np.repeat(clip.picture[None], 3, 0)
    lighter = (frames * 0.9).astype(np.uint8)
    assert colour_drift(frames, clip.picture) == pytest.approx(0, abs=1e-9)
    assert colour_drift(lighter, clip.picture) > 10
    grey = np.stack([small_grey(frame) for frame in clip.frames])
    other = make_clip(Split.TEST, 1, 1)
    still = small_grey(clip.picture)
    assert looks_likeness(grey, still) > 0.98
    assert looks_likeness(np.stack([small_grey(other.picture)] * 2), still) < looks_likeness(grey, still) - 0.1
    assert looks_likeness(np.zeros((2, 32, 32)), still) == 0


def test_the_mouth_follows_its_own_sound_better_than_a_late_or_another_one() -> None:
    """Drawn faces that talk; means over clips, because a single clip of two seconds has little to tell."""
    clips = [make_clip(Split.TEST, seed, 16, 64) for seed in range(4)]
    greys = [np.stack([small_grey(frame) for frame in clip.frames]) for clip in clips]
    loud = [loudness(clip.speech) for clip in clips]
    own = np.mean([mouth_correlation(grey, one) for grey, one in zip(greys, loud, strict=True)])
    late = np.mean([mouth_correlation(grey[3:], one[:-3]) for grey, one in zip(greys, loud, strict=True)])
    other = np.mean([mouth_correlation(grey, one) for grey, one in zip(greys, loud[1:] + loud[:1], strict=True)])
    assert own > late + 0.1
    assert own > other + 0.1


def test_a_still_picture_and_silence_correlate_with_nothing() -> None:
    still = np.repeat(small_grey(noise(32, 32, 3))[None], 8, 0)
    assert mouth_correlation(still, np.arange(8.0)) == 0
    moving = np.random.default_rng(1).uniform(0, 255, (8, 32, 32))
    assert mouth_correlation(moving, np.zeros(8)) == 0
