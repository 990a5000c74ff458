"""Where the speech features of a video frame come from, whole-file and streamed (spec section 12).

Host arithmetic in numpy; the speech encoder itself is a graph that the caller runs.
"""

from __future__ import annotations

import numpy as np

from live_avatar.arrays import Array
from live_avatar.config import FPS, StreamConfig
from live_avatar.errors import InputError

FEATURE_RATE_HZ = 50
TRAINED_RATE_HZ = 30  # features were stretched from 50 to 30 Hz, then sampled at 25 (quirk Q10)
VIDEO_RATE_HZ = FPS
PCM_SCALE = 32768.0
NORMALISATION_EPS = 1e-7  # of the wav2vec2 processor


def interpolate(hidden: Array, positions: Array) -> Array:
    """Columns of hidden [K, T, A] at real positions in 0..T-1, linearly -> [K, len(positions), A] float32."""
    low, part = columns_and_parts(positions)
    high = np.minimum(low + 1, hidden.shape[1] - 1)
    weight = part[:, None]
    return hidden[:, low] * (1 - weight) + hidden[:, high] * weight


def columns_and_parts(positions: Array) -> tuple[Array, Array]:
    """What `interpolate` reads of positions: whole columns, int64, and the part of the next one, float32."""
    low = np.floor(positions).astype(np.int64)
    return low, (positions - low).astype(np.float32)


def trained_columns(frames: Array) -> Array:
    """30 Hz column of each 25 fps frame: round(1.2 i), in integers (there are no ties)."""
    return (12 * np.asarray(frames, dtype=np.int64) + 5) // 10


def check_samples(samples: int, block_samples: int, speakers: int) -> None:
    """Raises `InputError` unless AUDIO of so many samples is a block of every speaker, or a keep-alive."""
    if samples in (0, speakers * block_samples):
        return
    of_each = "" if speakers == 1 else f" of each of {speakers} speakers, one after another"
    raise InputError(
        f"AUDIO has {samples} samples; a block has {block_samples}{of_each} (pad the last one with zeros), a "
        "keep-alive 0."
    )


class SpeechWindow:
    """The speech of one session so far, as the encoder sees it: a rolling window, normalised.

    The encoder was trained on whole files of zero mean and unit variance. Here both are taken over all
    speech heard so far (in integers, so exactly and in any order), which tends to the whole-file values. With several
    speakers a window without a sound is zeros, whatever the mean of what came before, so that all silent windows of
    one length are the same.
    """

    def __init__(self, stream: StreamConfig) -> None:
        self._stream = stream
        self._kept = np.zeros(0, dtype=np.int16)
        self._blocks = 0
        self._sum = 0
        self._square_sum = 0

    def push(self, samples: Array) -> Array:
        """One block, int16 [block_samples] -> the window, float32 [1, n], n a multiple of block_samples."""
        stream = self._stream
        if samples.dtype != np.int16 or samples.shape != (stream.block_samples,):
            raise InputError(
                f"a block of speech is {samples.dtype} {list(samples.shape)}; expected int16 [{stream.block_samples}], "
                "16 kHz mono, the last block padded with zeros."
            )
        wide = samples.astype(np.int64)
        self._sum += int(wide.sum())
        self._square_sum += int((wide * wide).sum())
        self._blocks += 1
        keep = stream.speech_window_blocks * stream.block_samples
        self._kept = np.concatenate([self._kept, samples])[-keep:]
        if stream.speakers > 1 and not self._kept.any():
            return np.zeros((1, self._kept.size), dtype=np.float32)
        count = self._blocks * stream.block_samples
        mean = self._sum / count
        variance = self._square_sum / count - mean * mean
        scale = 1 / np.sqrt(variance / PCM_SCALE**2 + NORMALISATION_EPS)
        return ((self._kept - mean) / PCM_SCALE * scale).astype(np.float32)[None]

    def positions(self, features: int) -> Array:
        """Columns of the window's `features` at which the frames of the newest block read, float64 [frames].

        Frame i reads where the released front end reads it in a long file, column round(1.2 i) at 30 Hz; before
        the first feature or after the last it reads that one. With look-ahead the frames lie that much earlier.
        """
        stream = self._stream
        columns = trained_columns(self.first_frame + np.arange(stream.block_frames))
        dropped = max(0, self._blocks - stream.speech_window_blocks) * stream.block_frames
        absolute = columns * (FEATURE_RATE_HZ / TRAINED_RATE_HZ)
        return np.clip(absolute - dropped * FEATURE_RATE_HZ // VIDEO_RATE_HZ, 0, features - 1)

    @property
    def first_frame(self) -> int:
        """Index of the newest block's first frame on the speech's clock; negative inside the look-ahead."""
        return (self._blocks - 1) * self._stream.block_frames - self._stream.lookahead_frames
