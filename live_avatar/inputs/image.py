"""An encoded picture becomes the pixels of a reference frame, and tells the size of a video that suits it.

Refuses what cannot be a picture before decoding it. Messages call the picture by the name that they are given.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from live_avatar.arrays import Array
from live_avatar.errors import ConfigError, InputError

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_BYTES = 32 * 2**20
MAX_PIXELS = 64_000_000
MIN_SIDE = 16
MAX_SCANS = 64  # of a JPEG; cameras and programs write 10 or fewer
PICTURE = "the reference image"
GROUND = (128, 128, 128)
"""The grey behind a picture's transparent parts."""
ORIENTATION_TAG = 0x0112
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PNG_START, JPEG_START = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
PNG_CHUNKS = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT"})
PNG_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # which may hold the orientation
MAX_TEXT_BYTES = 2**16
JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9
SIZE_STEP = 64  # pixels; sides of a video are multiples
SCALES = 100
LEAST_SHOWN = 2 / 3  # of a picture, without a warning
LEAST_SCALE = 0.1  # for a picture within the budget


def decode_image(data: bytes, height: int, width: int) -> Array:
    """PNG, JPEG or WebP bytes -> float32 [3, height, width] in -1..1. Raises as `decode_pixels` does."""
    return normalise(decode_pixels(data, height, width))


def decode_pixels(data: bytes, height: int, width: int) -> Array:
    """PNG, JPEG or WebP bytes -> uint8 [height, width, 3], scaled to cover and cropped in the middle.

    Transparent parts show `GROUND`. Raises `InputError` for anything else; a picture of more than `MAX_PIXELS` is
    refused by its header.
    """
    return fitted_pixels(open_picture(data), height, width)


def fitted_pixels(picture: Image.Image, height: int, width: int) -> Array:
    """The same for a picture that is open."""
    return np.asarray(opaque(fitted(picture, height, width), GROUND))


def fitted(picture: Image.Image, height: int, width: int) -> Image.Image:
    """The picture scaled to cover `height` x `width` pixels, and cropped in the middle."""
    return ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)


def opaque(picture: Image.Image, ground: tuple[int, int, int]) -> Image.Image:
    """The picture in RGB, with `ground` behind its transparent parts."""
    if picture.mode != "RGBA":
        return picture
    return Image.alpha_composite(Image.new("RGBA", picture.size, ground), picture).convert("RGB")


def normalise(pixels: Array) -> Array:
    """uint8 [height, width, 3] -> float32 [3, height, width] in -1..1."""
    return pixels.astype(np.float32).transpose(2, 0, 1) / 127.5 - 1


def picture_size(data: bytes) -> tuple[int, int]:
    """Height and width of a picture as it is seen, turned as its EXIF tag says. Raises as `decode_image` does."""
    picture = open_picture(data)
    return picture.height, picture.width


def crop_warning(data: bytes, height: int, width: int) -> str | None:
    """A sentence if a video of that size shows less than `LEAST_SHOWN` of a picture. Raises as `decode_image` does."""
    rows, columns = picture_size(data)
    shown = min(rows * width, columns * height) / max(rows * width, columns * height)
    if shown >= LEAST_SHOWN:
        return None
    return (
        f"the picture is {columns}x{rows}, and the video of {width}x{height} shows only the {shown:.0%} in its middle; "
        "crop the picture around the head, or choose a video of its shape."
    )


def check_bytes(data: bytes, name: str = PICTURE) -> None:
    """Raises `InputError` for a picture without bytes, or with too many."""
    if not data:
        raise InputError(f"{name} has 0 bytes; send an encoded PNG, JPEG or WebP.")
    if len(data) > MAX_BYTES:
        raise InputError(f"{name} has {len(data)} bytes, more than {MAX_BYTES}; send a smaller file.")


def open_picture(data: bytes, name: str = PICTURE) -> Image.Image:
    """The picture upright, in RGB or RGBA with 8 bits. Raises as `decode_pixels` does."""
    check_bytes(data, name)
    size = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size warning; the limit below is ours
            image = Image.open(io.BytesIO(_checked(data, name)), formats=FORMATS)
            size = f"{image.width}x{image.height}"
            _check_size(*image.size, name)
            _check_still(image, name)
            return _turned(_eight_bits(image), _orientation(image))
    except Image.DecompressionBombError as error:  # Pillow's own limit, far above ours, met in the header
        raise InputError(f"{name} has more than {MAX_PIXELS} pixels in all ({error}); scale it down first.") from error
    except MemoryError as error:
        raise InputError(f"{name} is {size} pixels, more than there is memory for; scale it down first.") from error
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise InputError(_unreadable(data, error, name)) from error


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
    """The picture in RGB, or in RGBA if it has transparent parts.

    Pillow's own conversion of 16-bit grey would cut every value above 255 to white.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _orientation(image: Image.Image) -> int:
    """The orientation in the picture's metadata; 1, upright, if they have none or cannot be read."""
    image.load()  # metadata may follow the pixels
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # as of `_picture`
        return 1


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    turn = ORIENTATIONS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _checked(data: bytes, name: str) -> bytes:
    """The file without metadata that Pillow could stumble over; raises `InputError` for a JPEG of too many scans."""
    if data.startswith(PNG_START):
        return PNG_START + b"".join(_png_chunks(data))
    if data.startswith(JPEG_START):
        _check_scans(data, name)
    return data


def _png_chunks(data: bytes) -> Iterator[bytes]:
    """The chunks of a PNG that make its pixels or its orientation; bytes that are no whole chunk stay as they are."""
    start = len(PNG_START)
    while start < len(data):
        length, kind = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8]
        end = start + 12 + length
        text = length <= MAX_TEXT_BYTES and data.startswith(PNG_TEXTS, start + 8)
        if kind in PNG_CHUNKS or text or end > len(data):
            yield data[start:end]
        start = end


def _check_scans(data: bytes, name: str) -> None:
    scans, start = 0, len(JPEG_START)
    while marker := JPEG_MARKER.search(data, start):
        kind = data[marker.start() + 1]
        if kind == END_OF_IMAGE:
            return
        scans += kind == START_OF_SCAN
        if scans > MAX_SCANS:
            raise InputError(f"{name} is a JPEG of more than {MAX_SCANS} scans; save it again as a plain JPEG.")
        start = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")


def _check_still(image: Image.Image, name: str) -> None:
    """Raises `InputError` for an animation. A JPEG with further pictures inside, as phones write, is a still."""
    if image.format in ("PNG", "WEBP") and getattr(image, "is_animated", False):
        frames = getattr(image, "n_frames", 0)
        raise InputError(f"{name} is animated ({frames} frames); send a still, such as its first frame.")


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise InputError(f"{name} is {width}x{height} pixels, more than {MAX_PIXELS} in all; scale it down first.")
    if min(width, height) < MIN_SIDE:
        raise InputError(f"{name} is {width}x{height} pixels; each side needs at least {MIN_SIDE}.")


def _unreadable(data: bytes, error: Exception, name: str) -> str:
    if isinstance(error, UnidentifiedImageError):
        return (
            f"{name} ({len(data)} bytes, beginning {data[:8]!r}) is not a PNG, JPEG or WebP; "
            "convert it to one of these."
        )
    return f"{name} ({len(data)} bytes) is damaged ({error}); send the whole file."
