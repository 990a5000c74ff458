"""An encoded picture becomes the pixels of a reference frame.

Refuses what cannot be a picture before decoding it. Knows Pillow; knows no network.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from live_avatar.arrays import Array
from live_avatar.errors import InputError

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_BYTES = 32 * 2**20
MAX_PIXELS = 64_000_000
MIN_SIDE = 16


def decode_image(data: bytes, height: int, width: int) -> Array:
    """PNG, JPEG or WebP bytes -> float32 [3, height, width] in -1..1, scaled to cover and cropped in the middle.

    Raises `InputError` for anything else; a picture of more than `MAX_PIXELS` is refused by its header.
    """
    if not data:
        raise InputError("the reference image has 0 bytes; send an encoded PNG, JPEG or WebP.")
    if len(data) > MAX_BYTES:
        raise InputError(f"the reference image has {len(data)} bytes, more than {MAX_BYTES}; send a smaller file.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size warning; the limit below is ours
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_size(*image.size)
            pixels = _eight_bits(ImageOps.exif_transpose(image)).convert("RGB")
    except Image.DecompressionBombError as error:  # Pillow's own limit, far above ours, met in the header
        raise InputError(
            f"the reference image has more than {MAX_PIXELS} pixels in all ({error}); scale it down first."
        ) from error
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise InputError(_unreadable(data, error)) from error
    fitted = ImageOps.fit(pixels, (width, height), Image.Resampling.BICUBIC)
    return np.asarray(fitted, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1


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
