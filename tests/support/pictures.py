"""Pictures for the tests: encoded ones, and hostile ones."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image


def encoded(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def jpeg_of_scans(side: int, repeats: int) -> bytes:
    """A small progressive JPEG whose last scan refines all coefficients, and is repeated: each takes the whole time."""
    head = encoded(Image.new("L", (side, side), 128), "JPEG", progressive=True)[:-2]
    start = head.index(b"\xff\xda", head.index(b"\xff\xda") + 2)
    end = head.index(b"\xff", start + 2 + int.from_bytes(head[start + 2 : start + 4], "big"))
    scan = bytearray(head[start:end])
    components = scan[4]
    scan[5 + 2 * components : 8 + 2 * components] = bytes([1, 63, 0x10])
    return head + bytes(scan) * repeats + b"\xff\xd9"
