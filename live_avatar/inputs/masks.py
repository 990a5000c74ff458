"""Masks of the speakers in a picture become the weights with which their speech moves the tokens of a frame.

A mask is a PNG of the picture's size, light where the speaker is (transparent parts count as black), or the text of a
box in the picture's pixels, `x,y,width,height`. It goes through the same scaling and cropping as the picture. Speakers
are counted from 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from live_avatar.arrays import Array
from live_avatar.config import PATCH, SPATIAL_STRIDE
from live_avatar.errors import InputError
from live_avatar.inputs.image import PNG_START, fitted, fitted_pixels, opaque, open_picture

MAX_MASK_BYTES = 2**20
BOX = re.compile(rb"\s*(\d{1,9})\s*,\s*(\d{1,9})\s*,\s*(\d{1,9})\s*,\s*(\d{1,9})\s*")
BLACK = (0, 0, 0)
LIGHT = 255
TOKEN_SIDE = SPATIAL_STRIDE * PATCH  # pixels


@dataclass(frozen=True)
class Scene:
    """A decoded picture, uint8 [H, W, 3], and the weights of its speakers, float32 [speakers, S] in 0..1; [0, S] for a
    picture without masks."""

    pixels: Array
    weights: Array


def decode_scene(picture: bytes, masks: Sequence[bytes], height: int, width: int) -> Scene:
    """Decodes a picture as `decode_pixels` does, and its masks. Raises `InputError` for a mask of another size than the
    picture, for one that leaves its speaker nothing, and for anything that is no mask."""
    opened = open_picture(picture)
    pixels = fitted_pixels(opened, height, width)
    weights = [_weights(mask, f"the mask of speaker {i}", opened.size, height, width) for i, mask in enumerate(masks)]
    return Scene(pixels, np.array(weights, dtype=np.float32).reshape(len(masks), token_count(height, width)))


def token_count(height: int, width: int) -> int:
    """Tokens S of a frame of so many pixels."""
    return (height // TOKEN_SIDE) * (width // TOKEN_SIDE)


def check_masks(masks: Sequence[bytes], speakers: int) -> None:
    """Raises `InputError` unless there is a mask for each of several speakers, and none for one alone."""
    if speakers == 1 and masks:
        raise InputError(
            f"{_counted(len(masks))} came for artifacts of one speaker; leave the masks out, or use artifacts made "
            "with `export --speakers`."
        )
    if speakers > 1 and len(masks) != speakers:
        raise InputError(
            f"{_counted(len(masks))} came for artifacts of {speakers} speakers; give one for each speaker."
        )
    for i, mask in enumerate(masks):
        if len(mask) > MAX_MASK_BYTES:
            raise InputError(
                f"the mask of speaker {i} has {len(mask)} bytes, more than {MAX_MASK_BYTES}; save it in grey, or "
                "give a box x,y,width,height."
            )


def _counted(masks: int) -> str:
    return "1 mask" if masks == 1 else f"{masks} masks"


def _weights(mask: bytes, name: str, size: tuple[int, int], height: int, width: int) -> Array:
    """Means over the pixels of each token, float32 [S]."""
    picture = _drawn(mask, name, size) if mask.startswith(PNG_START) else _box(mask, name, size)
    light = np.asarray(fitted(picture, height, width), dtype=np.float32)  # [H, W]
    grid = light.reshape(height // TOKEN_SIDE, TOKEN_SIDE, width // TOKEN_SIDE, TOKEN_SIDE)
    weights: Array = grid.mean(axis=(1, 3)).reshape(-1) / LIGHT
    if not weights.any():
        raise InputError(
            f"{name} is empty in the part of the picture that the video of {width}x{height} shows; make the mask light "
            "where the speaker is, and choose a video of the picture's shape."
        )
    return weights


def _drawn(mask: bytes, name: str, size: tuple[int, int]) -> Image.Image:
    """A mask that is a PNG, in grey."""
    picture = open_picture(mask, name)
    if picture.size != size:
        raise InputError(
            f"{name} is {picture.width}x{picture.height} pixels, and the picture {size[0]}x{size[1]}; give a mask of "
            "the picture's size."
        )
    return opaque(picture, BLACK).convert("L")


def _box(mask: bytes, name: str, size: tuple[int, int]) -> Image.Image:
    """A mask that is the text of a box, in grey."""
    match = BOX.fullmatch(mask)
    if match is None:
        raise InputError(
            f"{name} begins with {mask[:20]!r}; give a PNG of the picture's size, or a box in its pixels such as "
            "0,0,320,480 (x,y,width,height)."
        )
    x, y, width, height = map(int, match.groups())
    if x + width > size[0] or y + height > size[1]:
        raise InputError(
            f"{name} is the box {x},{y},{width},{height}, which leaves the picture of {size[0]}x{size[1]} pixels; give "
            "x,y,width,height inside it."
        )
    picture = Image.new("L", size)
    picture.paste(LIGHT, (x, y, x + width, y + height))
    return picture
