"""From phonemes and their loudness to the shape of a mouth in each video frame.

The shape of frame i is a weighted mean over 130 ms of sound, up to `AHEAD_S` after the frame's end. For an unvoiced
stop, lips and tongue close in silence, and the phoneme begins with the burst. So the shape of such a stop begins
`CLOSURE_S` before its phoneme. No frame depends on a phoneme that starts more than `AHEAD_S + CLOSURE_S` = 40 ms after
the frame's end.
"""
# ruff: noqa: RUF001 - the letters of the IPA are meant

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from live_avatar.arrays import Array
from live_avatar.config import FPS, SAMPLE_RATE_HZ
from live_avatar_client.espeak import Phoneme

HOP_S = 0.01
HOPS_PER_FRAME = round(1 / FPS / HOP_S)
HOP_SAMPLES = round(HOP_S * SAMPLE_RATE_HZ)
BEHIND_S = 0.07
AHEAD_S = 0.02
CLOSURE_S = 0.02
REST_WIDTH = 0.5
QUIET_GAIN, LOUD_GAIN = 0.5, 1.4
"""Factors of the opening in silence, and at 1.5 times the mean loudness of speech or above."""

_HOPS_BEFORE = round(BEHIND_S / HOP_S)
_HOPS_AFTER = round(AHEAD_S / HOP_S)
_AROUND = (_HOPS_BEFORE, _HOPS_AFTER)
_KERNEL = np.hanning(_HOPS_BEFORE + HOPS_PER_FRAME + _HOPS_AFTER + 2)[1:-1]
_KERNEL /= _KERNEL.sum()


@dataclass(frozen=True)
class Viseme:
    """A class of sounds that look alike. opening and width of the mouth, 0..1; symbols: letters of the IPA."""

    name: str
    opening: float
    width: float
    symbols: str


TABLE = (
    Viseme("rest", 0.0, REST_WIDTH, ""),
    Viseme("lips", 0.0, 0.45, "pbmɱ"),
    Viseme("teeth", 0.12, 0.55, "fvβ"),
    Viseme("tongue", 0.25, 0.55, "θðtdnlszɾrɹʔhxɡkŋcçɣʁʝʎɲɫɬʲ"),
    Viseme("rounded consonant", 0.22, 0.12, "ʃʒwʍɻ"),
    Viseme("close spread", 0.32, 1.0, "iɪje"),
    Viseme("mid", 0.65, 0.65, "ɛəɐɜɚɝʌɘɵᵻɨ"),
    Viseme("open", 1.0, 0.6, "aɑæ"),
    Viseme("open rounded", 0.8, 0.25, "ɔɒoøœ"),
    Viseme("close rounded", 0.35, 0.0, "uʊʉyʏ"),
)
VISEMES = tuple(viseme.name for viseme in TABLE)
_INDEX = {symbol: index for index, viseme in enumerate(TABLE) for symbol in viseme.symbols}
_UNVOICED_STOPS = frozenset("ptk")
_SHAPES = np.array([(viseme.opening, viseme.width) for viseme in TABLE])  # [visemes, 2]


def visemes_of(ipa: str) -> tuple[int, ...]:
    """Indices into `TABLE` of the letters of one phoneme: two for a diphthong or an affricate; rest for a pause.

    Marks such as stress and length have no effect.
    """
    return tuple(_INDEX[letter] for letter in ipa if letter in _INDEX) or (0,)


def hop_visemes(phonemes: Iterable[Phoneme], hops: int) -> Array:
    """Viseme of each 10 ms of sound from time 0, int64 [hops]; rest where there is no phoneme."""
    track = np.zeros(hops, np.int64)
    for phoneme in phonemes:
        early = CLOSURE_S if phoneme.ipa[:1] in _UNVOICED_STOPS else 0.0
        indices = visemes_of(phoneme.ipa)
        edges = np.linspace(phoneme.start_s - early, phoneme.end_s, len(indices) + 1) / HOP_S
        for index, (start, end) in zip(indices, pairwise(np.rint(edges).astype(int).clip(0)), strict=True):
            track[start:end] = index
    return track


def mouth_track(visemes: Array, speech: Array) -> tuple[Array, Array]:
    """Mouth shapes and visemes of the video frames.

    visemes [hops]; speech [hops * 160], the clean sound on any scale -> mouth float32 [hops / 4, 2], opening and width
    in 0..1, and the main viseme of each frame, int64 [hops / 4]. The opening is 0 in frames without phonemes.
    """
    weights = _per_frame(np.eye(len(TABLE))[np.pad(visemes, _AROUND)])  # [frames, visemes]
    mouth = weights @ _SHAPES
    mouth[:, 0] = np.minimum(1.0, mouth[:, 0] * _loudness_gain(visemes, speech))
    return mouth.astype(np.float32), weights.argmax(1)


def _loudness_gain(visemes: Array, speech: Array) -> Array:
    """Factor of the opening by loudness against the mean of the spoken parts, [frames]."""
    power = np.square(speech.astype(np.float64)).reshape(len(visemes), HOP_SAMPLES).mean(1)
    spoken = power[visemes > 0]
    mean = np.sqrt(spoken.mean()) if spoken.any() else 1.0
    level = np.sqrt(_per_frame(np.pad(power, _AROUND)[:, None])[:, 0]) / mean
    return np.interp(level, [0.0, 1.5], [QUIET_GAIN, LOUD_GAIN])


def _per_frame(track: Array) -> Array:
    """Weighted means of a track with `_AROUND` hops before and after the frames, [n, k] -> [frames, k]."""
    windows = sliding_window_view(track, len(_KERNEL), axis=0)[::HOPS_PER_FRAME]  # [frames, k, kernel]
    return windows @ _KERNEL
