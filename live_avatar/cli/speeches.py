"""The speech files and masks that `generate` and `stream` are given, as one speech of one speaker or of several."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from live_avatar.arrays import Array
from live_avatar_client.media import read_speech
from live_avatar_client.speakers import Speaker, mask_bytes, mixed

BOX = re.compile(r"\d+,\d+,\d+,\d+")


@dataclass(frozen=True)
class Speeches:
    """samples: int16 [samples], or [speakers, samples] with the `speakers` who say them; no speakers for one alone."""

    samples: Array
    speakers: tuple[Speaker, ...] = ()

    @property
    def track(self) -> Array:
        """What is heard, int16 [samples]."""
        return mixed(self.samples)

    @property
    def masks(self) -> tuple[bytes, ...]:
        """Raises `AvatarError` for a file that is no mask."""
        return mask_bytes(self.speakers)


def read_speeches(files: Sequence[Path], masks: Sequence[str]) -> Speeches:
    """Reads the speech of each speaker; shorter ones end with silence. Raises `UsageError` unless each of several has a
    mask, and `AvatarError` for a file that cannot be read."""
    expected = len(files) if len(files) > 1 else 0
    if len(masks) != expected:
        remedy = "give a --mask with each --audio" if expected else "one speaker needs none, several an --audio each"
        raise click.UsageError(f"--audio is given {_times(len(files))} and --mask {_times(len(masks))}; {remedy}")
    speeches = [read_speech(file) for file in files]
    if len(speeches) == 1:
        return Speeches(speeches[0])
    longest = max(map(len, speeches))
    samples = np.stack([np.pad(speech, (0, longest - len(speech))) for speech in speeches])
    return Speeches(samples, tuple(Speaker(_mask(text)) for text in masks))


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _mask(text: str) -> str | tuple[int, int, int, int]:
    if BOX.fullmatch(text) is None:
        return text
    x, y, width, height = map(int, text.split(","))
    return x, y, width, height
