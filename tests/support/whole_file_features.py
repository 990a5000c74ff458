"""The released code's front end for a whole file of speech (spec section 12), to compare streamed features with."""

from __future__ import annotations

import numpy as np

from live_avatar.arrays import Array
from live_avatar.inputs.speech import TRAINED_RATE_HZ, VIDEO_RATE_HZ, interpolate, trained_columns


def features_30hz(hidden: Array) -> Array:
    """Whole-file features [K, T, A] at 50 Hz -> [K, n, A] at 30 Hz with aligned corners."""
    total = hidden.shape[1]
    count = int(total / 50.0 * 30)  # this order of double operations, then truncation: the reference's count
    if count == 1:
        return hidden[:, :1].astype(np.float32)
    return interpolate(hidden, np.arange(count) * (total - 1) / (count - 1))


def bucket_features(hidden: Array, clip_frames: int) -> tuple[Array, Array, int]:
    """The reference's whole-file bucketing: features [1, K, A, frames] at 25 fps, their 30 Hz columns, clips."""
    features = features_30hz(hidden)
    count = features.shape[1]
    clips = int(count / (clip_frames * TRAINED_RATE_HZ / VIDEO_RATE_HZ)) + 1
    columns = trained_columns(np.arange(clips * clip_frames))
    padded = np.zeros((hidden.shape[0], int(columns.max()) + 1, hidden.shape[2]), dtype=np.float32)
    kept = min(count, padded.shape[1])
    padded[:, :kept] = features[:, :kept]
    return padded[:, columns].transpose(0, 2, 1)[None], columns, clips
