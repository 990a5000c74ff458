"""What the tests of both adapters share: speech, and what a conversation must look and sound like."""

from __future__ import annotations

import asyncio
import wave
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import soxr
from numpy.typing import NDArray

from live_avatar_client import AvatarSession
from live_avatar_client.protocol import BLOCK_SAMPLES, SAMPLES_PER_FRAME

T = TypeVar("T")
Samples = NDArray[np.int16]
Pixels = NDArray[np.uint8]

SPEECH = Path(__file__).parents[2] / "live_avatar" / "assets" / "speech.wav"
LONGEST_S = 120.0
EARLY_S, LATE_S = 0.045, 0.125
"""How much sound may come before and after its picture until viewers notice it (ITU-R BT.1359)."""


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a test's coroutine, and check that it leaves no task behind."""

    async def whole() -> T:
        async with asyncio.timeout(LONGEST_S):
            result = await work
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if left:  # what is cancelled needs a moment
            _, left = await asyncio.wait(left, timeout=30.0)
        assert not left, left
        return result

    return asyncio.run(whole())


def speech(seconds: float, rate_hz: int = 16_000) -> Samples:
    """The beginning of the demo's speech."""
    with wave.open(str(SPEECH)) as reader:
        samples = np.frombuffer(reader.readframes(round(seconds * 16_000)), "<i2")
    resampled: Samples = soxr.resample(samples, 16_000, rate_hz)
    return resampled


def chunks(samples: Samples, size: int = 1_001) -> list[Samples]:
    """Pieces of a size that fits nothing else."""
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def loudness(sound: Samples) -> int:
    """As `synthetic_frame` of the fake server writes it into the frames' blue."""
    return int(np.abs(sound.astype(np.int32)).mean()) >> 7 if len(sound) else 0


def tone(level: int, frames: int) -> Samples:
    """A square wave at 16 kHz whose loudness is `level` in every frame: a frame tells whose speech it shows."""
    return (np.tile([1, -1], frames * SAMPLES_PER_FRAME // 2) * (level << 7)).astype(np.int16)


def direct_frames(url: str, image: bytes, sounds: Sequence[Samples | None]) -> Pixels:
    """The frames that a plain session gives for the sounds of 40 ms at 16 kHz, None for silence, one after another."""
    heard = [np.zeros(0, np.int16) if sound is None else sound for sound in sounds]
    sent = np.concatenate([np.pad(sound, (0, SAMPLES_PER_FRAME - len(sound))) for sound in heard])
    sent = np.pad(sent, (0, -len(sent) % BLOCK_SAMPLES))
    with AvatarSession(url, image=image) as session:
        frames = np.concatenate([block.frames for block in session.stream(iter([sent]))])
    return frames[: len(sounds)]
