"""Where the speech features of a video frame come from, whole-file and streamed (spec section 12).

Host arithmetic in numpy; the speech encoder itself is a graph that the caller runs. It knows audio
samples and features, no video and no session protocol.
"""

from __future__ import annotations

import numpy as np

FEATURE_RATE_HZ = 50
TRAINED_RATE_HZ = 30  # features were stretched from 50 to 30 Hz, then sampled at 25 (quirk Q10)
VIDEO_RATE_HZ = 25


def interpolate(hidden: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Columns of hidden [K, T, A] at real positions in 0..T-1, linearly -> [K, len(positions), A] float32."""
    low = np.floor(positions).astype(np.int64)
    high = np.minimum(low + 1, hidden.shape[1] - 1)
    weight = (positions - low).astype(np.float32)[:, None]
    return hidden[:, low] * (1 - weight) + hidden[:, high] * weight


def trained_columns(frames: np.ndarray) -> np.ndarray:
    """30 Hz column of each 25 fps frame: round(1.2 i), in integers (there are no ties)."""
    return (12 * np.asarray(frames, dtype=np.int64) + 5) // 10


def features_30hz(hidden: np.ndarray) -> np.ndarray:
    """Whole-file features [K, T, A] at 50 Hz -> [K, n, A] at 30 Hz with aligned corners."""
    total = hidden.shape[1]
    count = int(total / 50.0 * 30)  # this order of double operations, then truncation: the reference's count
    if count == 1:
        return hidden[:, :1].astype(np.float32)
    return interpolate(hidden, np.arange(count) * (total - 1) / (count - 1))


def bucket_features(hidden: np.ndarray, clip_frames: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The reference's whole-file bucketing: features [1, K, A, frames] at 25 fps, their 30 Hz columns, clips."""
    features = features_30hz(hidden)
    count = features.shape[1]
    clips = int(count / (clip_frames * TRAINED_RATE_HZ / VIDEO_RATE_HZ)) + 1
    columns = trained_columns(np.arange(clips * clip_frames))
    padded = np.zeros((hidden.shape[0], int(columns.max()) + 1, hidden.shape[2]), dtype=np.float32)
    kept = min(count, padded.shape[1])
    padded[:, :kept] = features[:, :kept]
    return padded[:, columns].transpose(0, 2, 1)[None], columns, clips
