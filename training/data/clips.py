"""Clips of a talking face, the training data: pure functions of split, seed, length and size.

Blinks and the head's sway come from the seed alone, so no sound predicts them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from live_avatar.arrays import Array
from live_avatar.config import FPS
from training.data.face import Face, Pose
from training.data.identity import draw_identity
from training.data.speech import Utterance, make_utterance
from training.data.split import Part, Split, generator
from training.data.visemes import VISEMES

__all__ = ["VISEMES", "Clip", "Split", "Utterance", "make_clip", "make_utterance", "render"]

SWAY = (1.6, 0.9, 2.2)
"""Largest movement of the head to the side and up (1/96 of the picture's side), and its turn (degrees)."""
SWAY_HZ = (0.08, 0.35)
SWAY_START_S = 1.0
"""Time in which the sway grows from 0, so that a clip continues the picture."""
BLINK_EVERY_S = 3.0
BLINK = (0.5, 1.0, 1.0, 0.5, 0.25)
"""How far the eyelids are shut in the frames of a blink."""


@dataclass(frozen=True)
class Clip:
    """A talking face.

    prompt: names the looks. picture uint8 [H, W, 3]: the same face, mouth closed, eyes open, upright.
    speech int16 [S], 16 kHz mono. frames uint8 [n, H, W, 3] at 25 fps; frame i shows 40 i..40 (i + 1) ms of the speech.
    mouth float32 [n, 2]: true opening and width in 0..1. attributes: the looks by name.
    """

    prompt: str
    picture: Array
    speech: Array
    frames: Array
    mouth: Array
    attributes: dict[str, str]


def make_clip(split: Split, seed: int, blocks: int, size: int = 96) -> Clip:
    """Clip `seed` of a split, `blocks` * 12 frames of size x size pixels. Its sound is `make_utterance`'s."""
    identity = draw_identity(split, seed)
    utterance = make_utterance(split, seed, blocks)
    face = Face(identity, size)
    return Clip(
        prompt=identity.prompt,
        picture=face.frame(Pose()),
        speech=utterance.speech,
        frames=np.stack(list(render(face, utterance.mouth, generator(split, seed, Part.MOTION)))),
        mouth=utterance.mouth,
        attributes=dict(identity.looks),
    )


def render(face: Face, mouth: Array, random: np.random.Generator) -> Iterator[Array]:
    """One frame uint8 [H, W, 3] for each of the mouth shapes [n, 2], with random blinks and sway."""
    sway = _sway(len(mouth), random)
    lids = _lids(len(mouth), random)
    for (opening, width), lid, (x, y, angle) in zip(mouth.tolist(), lids.tolist(), sway.tolist(), strict=True):
        yield face.frame(Pose(opening, width, lid, x, y, angle))


def _sway(frames: int, random: np.random.Generator) -> Array:
    """Position of the head, [frames, 3]: two slow waves for each of x, y and angle, growing from 0."""
    time_s = np.arange(frames)[:, None, None] / FPS
    frequencies = random.uniform(*SWAY_HZ, (2, 3))
    phases = random.uniform(0, 2 * np.pi, (2, 3))
    waves = np.sin(2 * np.pi * frequencies * time_s + phases).mean(1)  # [frames, 3]
    grown = np.clip(np.arange(frames) / FPS / SWAY_START_S, 0, 1)
    return waves * SWAY * np.square(np.sin(np.pi / 2 * grown))[:, None]


def _lids(frames: int, random: np.random.Generator) -> Array:
    """How far the eyes are shut, [frames], 0..1."""
    lids = np.zeros(frames + len(BLINK))
    start = FPS // 2
    while (start := start + int(random.exponential(BLINK_EVERY_S) * FPS)) < frames:
        lids[start : start + len(BLINK)] = BLINK
        start += 2 * len(BLINK)
    return lids[:frames]
