"""An encoded picture becomes the pixels of a reference frame, and tells the size of a video that suits it.

Refuses what cannot be a picture before decoding it.
"""

from __future__ import annotations

import io
import math
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from live_avatar.arrays import Array
from live_avatar.errors import ConfigError, InputError

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_BYTES = 32 * 2**20
MAX_PIXELS = 64_000_000
MIN_SIDE = 16
SIZE_STEP = 64  # pixels; sides of a video are multiples
SCALES = 100
LEAST_SCALE = 0.1  # for a picture within the budget


def decode_image(data: bytes, height: int, width: int) -> Array:
    """PNG, JPEG or WebP bytes -> float32 [3, height, width] in -1..1. Raises as `decode_pixels` does."""
    return normalise(decode_pixels(data, height, width))


def decode_pixels(data: bytes, height: int, width: int) -> Array:
    """PNG, JPEG or WebP bytes -> uint8 [height, width, 3], scaled to cover and cropped in the middle.

    Raises `InputError` for anything else; a picture of more than `MAX_PIXELS` is refused by its header.
    """
    return np.asarray(ImageOps.fit(_picture(data), (width, height), Image.Resampling.BICUBIC))


def normalise(pixels: Array) -> Array:
    """uint8 [height, width, 3] -> float32 [3, height, width] in -1..1."""
    return pixels.astype(np.float32).transpose(2, 0, 1) / 127.5 - 1


def picture_size(data: bytes) -> tuple[int, int]:
    """Height and width of a picture as it is seen, turned as its EXIF tag says. Raises as `decode_image` does."""
    picture = _picture(data)
    return picture.height, picture.width


def _picture(data: bytes) -> Image.Image:
    """The picture upright, in RGB with 8 bits."""
    if not data:
        raise InputError("the reference image has 0 bytes; send an encoded PNG, JPEG or WebP.")
    if len(data) > MAX_BYTES:
        raise InputError(f"the reference image has {len(data)} bytes, more than {MAX_BYTES}; send a smaller file.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size warning; the limit below is ours
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_size(*image.size)
            return _eight_bits(ImageOps.exif_transpose(image)).convert("RGB")
    except Image.DecompressionBombError as error:  # Pillow's own limit, far above ours, met in the header
        raise InputError(
            f"the reference image has more than {MAX_PIXELS} pixels in all ({error}); scale it down first."
        ) from error
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise InputError(_unreadable(data, error)) from error


def area_size(height: int, width: int, budget: int) -> tuple[int, int]:
    """Height and width of the video for a picture of `height` x `width` pixels, at most `budget` pixels in all.

    The first of 100 falling scales at which both sides, rounded up to multiples of 64, fit (spec section 10, the
    released front end's rule). No scale fits a very long strip; its size follows from the ratio of the sides, rounded
    down to multiples of 64 but to no less than 64, where the released code would give a side of 0. Raises
    `ConfigError` for a budget below 64 x 64, `InputError` for an empty picture.
    """
    if budget < SIZE_STEP**2:
        raise ConfigError(f"an area of {budget} pixels is below {SIZE_STEP}x{SIZE_STEP}, the smallest video; raise it.")
    if min(height, width) < 1:
        raise InputError(f"the picture is {width}x{height} pixels; each side needs at least 1.")
    largest, least = _scales(height, width, budget)
    for i in range(SCALES):
        scale = largest - (largest - least) * i / SCALES
        size = _up(int(height * scale)), _up(int(width * scale))
        if size[0] * size[1] <= budget:
            return size
    return _strip_size(height, width, budget)


def _scales(height: int, width: int, budget: int) -> tuple[float, float]:
    """The largest scale worth trying, and the one below the last."""
    area = height * width
    if area <= budget:
        return 1.0, LEAST_SCALE
    margin = SIZE_STEP - 1
    b, c = margin * (height + width), margin**2 - budget
    return math.sqrt(budget / area), (-b + math.sqrt(b * b - 2 * area * c)) / (2 * area)


def _strip_size(height: int, width: int, budget: int) -> tuple[int, int]:
    area = min(budget, height * width)
    short = _down(math.sqrt(area * min(height, width) / max(height, width)))
    long = min(_down(math.sqrt(area * max(height, width) / min(height, width))), _down(budget / short))
    return (short, long) if height <= width else (long, short)


def _up(pixels: int) -> int:
    return max(-(-pixels // SIZE_STEP), 1) * SIZE_STEP


def _down(pixels: float) -> int:
    return max(int(pixels) // SIZE_STEP, 1) * SIZE_STEP


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey; Pillow's own conversion would cut every value above 255 to white."""
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise InputError(
            f"the reference image is {width}x{height} pixels, more than {MAX_PIXELS} in all; scale it down first."
        )
    if min(width, height) < MIN_SIDE:
        raise InputError(f"the reference image is {width}x{height} pixels; each side needs at least {MIN_SIDE}.")


def _unreadable(data: bytes, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return (
            f"the reference image ({len(data)} bytes, beginning {data[:8]!r}) is not a PNG, JPEG or WebP; "
            "convert it to one of these."
        )
    return f"the reference image ({len(data)} bytes) is damaged ({error}); send the whole file."
