"""Cuts speech that comes in chunks of any size into the blocks that the server takes."""

import math
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .errors import InvalidInput
from .protocol import BLOCK_SAMPLES, SAMPLE_RATE_HZ

Samples: TypeAlias = NDArray[np.int16]

_CHUNK_S: Final = 0.1
"""Speech that comes as it is spoken is ahead of its time by one chunk; microphones give shorter ones."""

MAX_PEAK: Final = 16.0
"""Float samples beyond are of another scale, such as that of int16; less is loud, and clipped at 1."""

NO_SAMPLES: Final[Samples] = np.zeros(0, np.int16)


def silence(samples: int, speakers: int = 1) -> Samples:
    """Return zeros, [samples] of one speaker or [speakers, samples] of several."""
    return np.zeros(samples if speakers == 1 else (speakers, samples), np.int16)


@dataclass(frozen=True, eq=False)
class SpeechBlock:
    """A whole block of audio of all speakers, with the times at which its first and last sample were given."""

    samples: Samples
    started_at_s: float
    complete_at_s: float
    speech_samples: int = BLOCK_SAMPLES
    """Where the speech ends; what follows is padding."""


def silent_block(now_s: float, speakers: int = 1) -> SpeechBlock:
    """Return a block without speech."""
    return SpeechBlock(silence(BLOCK_SAMPLES, speakers), now_s, now_s, speech_samples=0)


class BlockCutter:
    """Cuts chunks of any size, [samples] or [speakers, samples], into blocks of 7,680 samples."""

    def __init__(self, speakers: int = 1) -> None:
        self.samples = 0
        """How many samples were added."""
        self._none = silence(0, speakers)
        self._rest = self._none
        self._rest_started_at_s = 0.0
        self._rest_complete_at_s = 0.0

    def blocks_completed_by(self, chunk: Samples) -> int:
        """Return how many blocks `add` would return."""
        return (self._rest.shape[-1] + chunk.shape[-1]) // BLOCK_SAMPLES

    def add(self, chunk: Samples, now_s: float) -> list[SpeechBlock]:
        """Copy a chunk and return the blocks it completes."""
        if not chunk.shape[-1]:
            return []
        started_at_s = self._rest_started_at_s if self._rest.shape[-1] else now_s
        pending = np.concatenate((self._rest, chunk), axis=-1)
        whole = pending.shape[-1] // BLOCK_SAMPLES
        blocks = [
            SpeechBlock(
                pending[..., i * BLOCK_SAMPLES : (i + 1) * BLOCK_SAMPLES], started_at_s if i == 0 else now_s, now_s
            )
            for i in range(whole)
        ]
        self.samples += chunk.shape[-1]
        self._rest = pending[..., whole * BLOCK_SAMPLES :].copy()
        self._rest_started_at_s = now_s if whole else started_at_s
        self._rest_complete_at_s = now_s
        return blocks

    def live_at_s(self) -> float:
        """Return from when on the samples of an incomplete block have come no faster than they are spoken; infinity
        if there are none."""
        rest = self._rest.shape[-1]
        return self._rest_started_at_s + rest / SAMPLE_RATE_HZ - _CHUNK_S if rest else math.inf

    def begin(self) -> SpeechBlock:
        """Return the samples of an incomplete block as the end of a block that begins with silence."""
        return self._padded(before=BLOCK_SAMPLES - self._rest.shape[-1], speech_samples=BLOCK_SAMPLES)

    def finish(self) -> list[SpeechBlock]:
        """Return the last block, padded with silence, if samples are left."""
        speech = self._rest.shape[-1]
        return [self._padded(after=BLOCK_SAMPLES - speech, speech_samples=speech)] if speech else []

    def _padded(self, before: int = 0, after: int = 0, *, speech_samples: int) -> SpeechBlock:
        samples = np.pad(self._rest, [*[(0, 0)] * (self._rest.ndim - 1), (before, after)])
        self.drop_rest()
        return SpeechBlock(samples, self._rest_started_at_s, self._rest_complete_at_s, speech_samples)

    def drop_rest(self) -> None:
        """Drop the samples of an incomplete block."""
        self._rest = self._none


def as_samples(pcm: object) -> Samples:
    """Return `pcm` as int16: int16 unchanged, float32 scaled from [-1, 1] and clipped."""
    if not isinstance(pcm, np.ndarray):
        raise InvalidInput(
            f"pcm is a {type(pcm).__name__}; pass a numpy array, for raw bytes np.frombuffer(pcm, '<i2')"
        )
    if pcm.ndim != 1:
        raise InvalidInput(f"pcm has the shape {pcm.shape}; pass one dimension of mono samples at 16 kHz")
    if pcm.dtype == np.int16:
        return pcm
    if pcm.dtype != np.float32:
        raise InvalidInput(f"pcm has the type {pcm.dtype}; pass int16, or float32 in [-1, 1]")
    if not np.isfinite(pcm).all():
        at = int(np.argmin(np.isfinite(pcm)))
        raise InvalidInput(f"sample {at} of pcm is {pcm[at]}; pass finite values in [-1, 1]")
    if (peak := float(np.abs(pcm).max(initial=0.0))) > MAX_PEAK:
        raise InvalidInput(f"pcm has values of up to {peak:g} as float32; pass values in [-1, 1], or int16")
    scaled: Samples = np.rint(np.clip(pcm, -1, 32767 / 32768) * 32768).astype(np.int16)
    return scaled
