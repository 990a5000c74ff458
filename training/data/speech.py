"""The sound of a clip and its mouth shapes: a voice reads sentences, with pauses, noise and a microphone.

Everything is a pure function of split, seed and length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from live_avatar.arrays import Array
from live_avatar.config import SAMPLE_RATE_HZ, TINY
from live_avatar_client.espeak import Phoneme, Voice, speak
from training.data.split import Part, Split, generator
from training.data.texts import sentence
from training.data.visemes import HOP_SAMPLES, hop_visemes, mouth_track
from training.data.voices import draw_voice

BLOCK_SAMPLES = TINY.stream.block_samples
SILENT_SHARE, NOISE_SHARE = 0.03, 0.04
"""Shares of utterances without speech."""
LATE_SHARE = 0.5
"""Share of utterances that begin with a pause; the others begin inside a sentence."""
FULL_SCALE = 32768.0


@dataclass(frozen=True)
class Utterance:
    """speech int16 [S]; mouth float32 [n, 2], opening and width in 0..1; viseme int64 [n], indices of `VISEMES`.

    Frame i of the n, 25 per second, shows the time 40 i..40 (i + 1) ms of the speech.
    """

    speech: Array
    mouth: Array
    viseme: Array


@dataclass(frozen=True)
class Line:
    """A sentence in an utterance: its first sample there (below 0 if cut), its sound float64 [n] and its phonemes."""

    start: int
    sound: Array
    phonemes: tuple[Phoneme, ...]


def make_utterance(split: Split, seed: int, blocks: int) -> Utterance:
    """Utterance `seed` of a split, `blocks` * 0.48 s long; the same on every machine for the same arguments."""
    random = generator(split, seed, Part.SPEECH)
    samples = blocks * BLOCK_SAMPLES
    kind = random.random()
    lines = [] if kind < SILENT_SHARE + NOISE_SHARE else _lines(split, random, samples)
    clean = _mixed(lines, samples)
    mouth, viseme = mouth_track(hop_visemes(_phonemes(lines), samples // HOP_SAMPLES), clean)
    heard = clean if kind < SILENT_SHARE else _recorded(clean, random)
    return Utterance(np.rint(heard * (FULL_SCALE - 1)).astype(np.int16), mouth, viseme)


def _lines(split: Split, random: np.random.Generator, samples: int) -> list[Line]:
    """Sentences of one speaker with pauses between, until the utterance is full."""
    voice = draw_voice(split, random)
    lines: list[Line] = []
    end = int(random.uniform(0.1, 1.2) * SAMPLE_RATE_HZ) if random.random() < LATE_SHARE else None
    while end is None or end < samples:
        sound, phonemes = _said(sentence(split, random), voice, random)
        start = -int(random.uniform(0.0, 0.7) * len(sound)) if end is None else end
        lines.append(Line(start, sound, phonemes))
        end = start + len(sound) + int(random.exponential(0.25) * SAMPLE_RATE_HZ)
    return lines


def _said(text: str, voice: Voice, random: np.random.Generator) -> tuple[Array, tuple[Phoneme, ...]]:
    """One sentence, at a random loudness."""
    spoken = speak(text, voice)
    return spoken.speech / FULL_SCALE * random.uniform(0.6, 1.4), spoken.phonemes


def _mixed(lines: list[Line], samples: int) -> Array:
    """The sentences at their places, float64 [samples]."""
    mixed = np.zeros(samples)
    for line in lines:
        part = line.sound[max(0, -line.start) : samples - line.start]
        mixed[max(0, line.start) :][: len(part)] += part
    return mixed


def _phonemes(lines: list[Line]) -> list[Phoneme]:
    """All phonemes on the utterance's clock."""
    return [
        Phoneme(one.ipa, one.start_s + line.start / SAMPLE_RATE_HZ, one.end_s + line.start / SAMPLE_RATE_HZ)
        for line in lines
        for one in line.phonemes
    ]


def _recorded(clean: Array, random: np.random.Generator) -> Array:
    """The sound through a microphone of random tilt and level, with noise of random colour; peak below full scale."""
    speech = _tilted(clean, random.uniform(-0.3, 0.3))
    noise = _tilted(random.standard_normal(len(clean)), random.uniform(-1.0, 0.0))
    noise_level = 10 ** (random.uniform(-50, -18) / 20)
    sound = _unit(speech) + _unit(noise) * noise_level
    level = 10 ** (random.uniform(-32, -17) / 20)
    return np.clip(_unit(sound) * level, -1.0, 1.0)


def _unit(sound: Array) -> Array:
    """The sound scaled to RMS 1; silence is unchanged."""
    rms = np.sqrt(np.square(sound).mean())
    return sound / rms if rms else sound


def _tilted(sound: Array, exponent: float) -> Array:
    """The sound with amplitudes in proportion to frequency^exponent above 60 Hz."""
    spectrum = np.fft.rfft(sound)
    frequencies = np.fft.rfftfreq(len(sound), 1 / SAMPLE_RATE_HZ)
    return np.fft.irfft(spectrum * (np.maximum(frequencies, 60.0) / 1000.0) ** exponent, len(sound))
