"""Identities: random looks, and a prompt that names them.

A combination of looks belongs to one split, by a checksum of their names.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from training.data.canvas import Colour
from training.data.split import Part, Split, generator

HAIR: Mapping[str, Colour] = MappingProxyType(
    {
        "black": (46, 40, 46),
        "brown": (112, 74, 48),
        "blonde": (232, 194, 112),
        "red": (190, 80, 44),
        "grey": (164, 164, 170),
    }
)
SKIN: Mapping[str, Colour] = MappingProxyType(
    {
        "pale": (252, 222, 200),
        "light": (243, 202, 168),
        "tan": (216, 164, 122),
        "brown": (172, 118, 82),
        "dark": (144, 96, 70),
    }
)
EYES: Mapping[str, Colour] = MappingProxyType(
    {"blue": (70, 130, 190), "green": (80, 145, 95), "brown": (105, 68, 42), "grey": (120, 132, 142)}
)
CLOTHES: Mapping[str, Colour] = MappingProxyType(
    {
        "white": (236, 236, 232),
        "black": (52, 52, 60),
        "red": (200, 62, 62),
        "blue": (58, 92, 168),
        "green": (64, 132, 88),
        "yellow": (236, 190, 70),
        "purple": (128, 84, 158),
    }
)
BACKGROUNDS: Mapping[str, Colour] = MappingProxyType(
    {
        "blue": (120, 168, 214),
        "green": (140, 190, 140),
        "yellow": (240, 214, 130),
        "pink": (238, 176, 188),
        "grey": (178, 182, 188),
        "purple": (170, 150, 206),
        "orange": (242, 182, 124),
        "teal": (112, 186, 182),
    }
)
STYLES = MappingProxyType(
    {
        "woman": ("long", "bob", "bun", "curly", "fringe"),
        "man": ("short", "curly", "bald", "parted", "spiky"),
    }
)
GLASSES = ("no", "no", "no", "round", "square")
"""Each as often as it is listed here."""

PROMPTS = (
    "a {hair} {person}, {background} background",
    "a {hair} {person} in a {clothes} shirt, {background} background",
    "portrait of a {hair} {person} with {eyes} eyes, {background} background",
    "a {person} talking, {hair}, {clothes} shirt, {background} wall",
    "a friendly {hair} {person} with {skin} skin and {eyes} eyes, {clothes} clothes, {background} background",
)

SHARES = {Split.TRAIN: range(8), Split.VALIDATION: range(8, 9), Split.TEST: range(9, 10)}
"""Tenths of all combinations, by split."""


@dataclass(frozen=True)
class Identity:
    """looks: person, style, hair, skin, eyes, clothes, background, glasses, by name.

    width, height: factors of the face's sides; eye_distance, brow_tilt, mouth_size: small deviations about 0;
    tints: [4, 3], added to the colours of hair, skin, clothes and background.
    """

    looks: Mapping[str, str]
    prompt: str
    width: float
    height: float
    eye_distance: float
    brow_tilt: float
    mouth_size: float
    tints: tuple[Colour, Colour, Colour, Colour]


def draw_identity(split: Split, seed: int) -> Identity:
    """Identity `seed` of a split."""
    random = generator(split, seed, Part.IDENTITY)
    looks = _looks(random)
    while split_of(looks) is not split:
        looks = _looks(random)
    width, height, eye_distance, brow_tilt, mouth_size = random.uniform(-1, 1, 5)
    hair, skin, clothes, background = (_tint(random) for _ in range(4))
    return Identity(
        looks=looks,
        prompt=_prompt(looks, random),
        width=1 + 0.05 * width,
        height=1 + 0.03 * height,
        eye_distance=eye_distance,
        brow_tilt=brow_tilt,
        mouth_size=mouth_size,
        tints=(hair, skin, clothes, background),
    )


def split_of(looks: Mapping[str, str]) -> Split:
    """The split that a combination of looks belongs to. Eyes and glasses do not matter."""
    names = (looks[key] for key in ("person", "style", "hair", "skin", "clothes", "background"))
    tenth = zlib.crc32(" ".join(names).encode()) % 10
    return next(split for split, tenths in SHARES.items() if tenth in tenths)


def _tint(random: np.random.Generator) -> Colour:
    red, green, blue = random.integers(-10, 11, 3).tolist()
    return red, green, blue


def _looks(random: np.random.Generator) -> dict[str, str]:
    def one(names: Iterable[str]) -> str:
        return str(random.choice(list(names)))

    person = one(STYLES)
    return {
        "person": person,
        "style": one(STYLES[person]),
        "hair": one(HAIR),
        "skin": one(SKIN),
        "eyes": one(EYES),
        "clothes": one(CLOTHES),
        "background": one(BACKGROUNDS),
        "glasses": one(GLASSES),
    }


def _prompt(looks: Mapping[str, str], random: np.random.Generator) -> str:
    hair = "bald" if looks["style"] == "bald" else f"{looks['hair']}-haired"
    prompt = PROMPTS[random.integers(len(PROMPTS))].format(**{**looks, "hair": hair})
    return prompt if looks["glasses"] == "no" else f"{prompt}, {looks['glasses']} glasses"
