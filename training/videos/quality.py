"""Measures of video quality that need no weights, and the Fréchet distance that FID and FVD take of features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from live_avatar.arrays import Array
from live_avatar.errors import InputError

PEAK = 255.0
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # of Wang et al., 2004
SSIM_C1, SSIM_C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
LUMA = (0.299, 0.587, 0.114)
SAME_DB = 100.0
"""PSNR of frames that are equal, whose error has no logarithm."""


def psnr(ours: Array, expected: Array) -> float:
    """Mean over frames of the peak signal-to-noise ratio, dB: uint8 [n, H, W, 3] each."""
    error = np.square(ours.astype(np.float64) - expected).mean((1, 2, 3))
    least = PEAK**2 / 10 ** (SAME_DB / 10)
    return float((10 * np.log10(PEAK**2 / np.maximum(error, least))).mean())


def ssim(ours: Array, expected: Array) -> float:
    """Mean structural similarity of the brightness: uint8 [n, H, W, 3] each, at least 11 pixels a side."""
    a, b = (torch.from_numpy(frames @ np.array(LUMA))[:, None] for frames in (ours, expected))
    mean_a, mean_b = _blurred(a), _blurred(b)
    var_a, var_b = _blurred(a * a) - mean_a**2, _blurred(b * b) - mean_b**2
    both = _blurred(a * b) - mean_a * mean_b
    likeness = ((2 * mean_a * mean_b + SSIM_C1) * (2 * both + SSIM_C2)) / (
        (mean_a**2 + mean_b**2 + SSIM_C1) * (var_a + var_b + SSIM_C2)
    )
    return likeness.mean().item()


def _blurred(x: Tensor) -> Tensor:
    """[n, 1, H, W] under a Gaussian window, where it fits."""
    at = torch.arange(SSIM_WINDOW, dtype=x.dtype) - SSIM_WINDOW // 2
    weight = torch.exp(-at.square() / (2 * SSIM_SIGMA**2))
    weight /= weight.sum()
    return F.conv2d(F.conv2d(x, weight[None, None, None]), weight[None, None, :, None])


def colour_drift(frames: Array, picture: Array) -> float:
    """Distance of the mean colour of frames uint8 [n, H, W, 3] from that of a picture [H, W, 3], levels of 255."""
    return float(np.linalg.norm(frames.mean((0, 1, 2)) - picture.mean((0, 1))))


def looks_likeness(grey: Array, picture: Array) -> float:
    """Correlation of the mean of small grey frames [n, h, w] with a small grey picture [h, w], -1..1.

    It sees whether head, hair and background stay where they were and as light: identity in the sense of pixels only.
    """
    seen, expected = grey.mean(0).ravel(), picture.ravel()
    if min(seen.std(), expected.std()) < 1e-6:
        return 0.0
    return float(np.corrcoef(seen, expected)[0, 1])


@dataclass
class Moments:
    """Mean and covariance of features that come in pieces."""

    count: int = 0
    total: Array | None = None
    squares: Array | None = None

    def add(self, features: Array) -> None:
        """Takes features [n, d] in."""
        wide = features.astype(np.float64)
        if self.total is None or self.squares is None:
            self.total, self.squares = np.zeros(wide.shape[1]), np.zeros((wide.shape[1],) * 2)
        self.count += len(wide)
        self.total += wide.sum(0)
        self.squares += wide.T @ wide

    def gaussian(self) -> tuple[Array, Array]:
        """Mean [d] and covariance [d, d]. Raises `InputError` for fewer than two features."""
        if self.count < 2 or self.total is None or self.squares is None:
            raise InputError(f"{self.count} features have no covariance; give longer or more videos.")
        mean = self.total / self.count
        covariance = (self.squares - self.count * np.outer(mean, mean)) / (self.count - 1)
        return mean, covariance


def frechet(ours: Moments, expected: Moments) -> float:
    """Fréchet distance of the Gaussians of two sets of features: |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½)."""
    (mean_a, cov_a), (mean_b, cov_b) = ours.gaussian(), expected.gaussian()
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    # C1 C2 has the eigenvalues of the symmetric root C2 root, which are not negative.
    crossed = np.linalg.eigvalsh(root @ cov_b @ root)
    trace = np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(np.maximum(crossed, 0)).sum()
    return float(np.square(mean_a - mean_b).sum() + trace)
