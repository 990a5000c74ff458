"""Reads the bytes of a reference image and checks its size and type.

It looks only at the size and the first bytes and decodes nothing. The server checks width and height
(`protocol.MAX_IMAGE_PIXELS`).
"""

import os
from pathlib import Path

from .errors import InvalidInput, MediaError
from .files import require_file
from .protocol import MAX_IMAGE_BYTES


def read_image_bytes(path: str | os.PathLike[str]) -> bytes:
    """Read the encoded image at `path`; raise MediaError when it is no PNG, JPEG or WebP file."""
    file = Path(path)
    require_file(file, "image", "a PNG, JPEG or WebP file")
    try:
        # One byte more than the limit shows that a file is too large, without reading all of it.
        with file.open("rb") as stream:
            data = stream.read(MAX_IMAGE_BYTES + 1)
    except OSError as error:
        raise MediaError(f"the image {str(file)!r} cannot be read: {error.strerror}; pass another file") from error
    if fault := _fault(data):
        raise MediaError(f"the image {str(file)!r} {fault}")
    return data


def image_bytes(image: bytes | str | os.PathLike[str]) -> bytes:
    """Return an encoded image given as its bytes or as the path of its file."""
    if isinstance(image, (str, os.PathLike)):
        return read_image_bytes(image)
    if not isinstance(image, bytes):
        raise InvalidInput(
            f"image is a {type(image).__name__}; pass the bytes of a PNG, JPEG or WebP file, or its path"
        )
    if fault := _fault(image):
        raise InvalidInput(f"the image {fault}")
    return image


def _fault(data: bytes) -> str | None:
    if not data:
        return "has 0 bytes; pass a PNG, JPEG or WebP file"
    if len(data) > MAX_IMAGE_BYTES:
        return f"has more than {MAX_IMAGE_BYTES} bytes, the limit; save it smaller"
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    if not is_webp and not data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")):
        return f"starts with {data[:8]!r}, which is no PNG, JPEG or WebP file; save it as one of these"
    return None
