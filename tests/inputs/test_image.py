"""Pictures that people send, and what is refused before it costs anything."""

from __future__ import annotations

import io
import resource
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from live_avatar.arrays import Array
from live_avatar.errors import ConfigError, InputError
from live_avatar.inputs.image import (
    GROUND,
    MAX_BYTES,
    MAX_SCANS,
    area_size,
    crop_warning,
    decode_image,
    decode_pixels,
    normalise,
    picture_size,
)
from tests.support.pictures import encoded, jpeg_of_scans

HEIGHT, WIDTH = 64, 96
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def bands(width: int, height: int, *colours: tuple[int, ...], mode: str = "RGB") -> Image.Image:
    """Vertical bands of equal width, from left to right."""
    image = Image.new(mode, (width, height))
    for i, colour in enumerate(colours):
        image.paste(colour, (i * width // len(colours), 0, (i + 1) * width // len(colours), height))
    return image


def colour(pixels: Array, row: int, column: int) -> tuple[int, ...]:
    return tuple(round((float(value) + 1) * 127.5) for value in pixels[:, row, column])


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header promises a picture and whose data is a kilobyte of zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("file_format", "options"), [("PNG", {}), ("JPEG", {"quality": 95}), ("WEBP", {"lossless": True})]
)
def test_the_three_formats(file_format: str, options: dict[str, Any]) -> None:
    picture = Image.radial_gradient("L").convert("RGB").resize((WIDTH, HEIGHT))
    pixels = decode_image(encoded(picture, file_format, **options), HEIGHT, WIDTH)
    assert pixels.dtype == np.float32
    assert pixels.shape == (3, HEIGHT, WIDTH)
    expected = np.asarray(picture, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1
    levels = np.abs(pixels - expected).max() * 127.5
    assert levels <= (4 if file_format == "JPEG" else 0.001)


def test_black_is_minus_one_and_white_is_one() -> None:
    pixels = decode_image(encoded(bands(128, 64, (0, 0, 0), (255, 255, 255))), 64, 128)
    assert (pixels[:, :, 0] == -1).all()
    assert (pixels[:, :, -1] == 1).all()


def test_the_crop_is_in_the_middle() -> None:
    wide = decode_image(encoded(bands(300, 100, RED, GREEN, BLUE)), 64, 64)
    assert {colour(wide, row, column) for row in (0, 63) for column in (2, 32, 61)} == {GREEN}
    tall = decode_image(encoded(bands(300, 100, RED, GREEN, BLUE).rotate(90, expand=True)), 64, 64)
    assert {colour(tall, row, column) for row in (2, 32, 61) for column in (0, 63)} == {GREEN}


def test_a_picture_is_scaled_to_cover_without_distortion() -> None:
    pixels = decode_image(encoded(bands(400, 200, RED, GREEN, BLUE, RED)), 64, 96)  # 2 : 1 becomes 3 : 2
    edges = np.flatnonzero(np.diff((pixels[1, 32] > 0).astype(int)))
    assert edges.tolist() == pytest.approx([96 / 2 - 32 - 0.5, 96 / 2 - 0.5], abs=1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(orientation: int) -> None:
    stored = bands(96, 96, RED, GREEN, BLUE)
    stored.paste((255, 255, 255), (0, 0, 30, 30))
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen = decode_image(encoded(stored, exif=exif), 96, 96)
    tagged = Image.open(io.BytesIO(encoded(stored, exif=exif)))
    upright = {
        1: lambda i: i,
        2: ImageOps.mirror,
        3: lambda i: i.rotate(180),
        4: ImageOps.flip,
        5: lambda i: ImageOps.mirror(i).rotate(90, expand=True),
        6: lambda i: i.rotate(270, expand=True),
        7: lambda i: ImageOps.mirror(i).rotate(270, expand=True),
        8: lambda i: i.rotate(90, expand=True),
    }[orientation](tagged.copy())
    corners = [(5, 5), (5, 90), (90, 5), (90, 90)]
    assert [colour(seen, row, column) for row, column in corners] == [
        upright.getpixel((column, row)) for row, column in corners
    ]


def test_a_rotated_phone_picture_is_cropped_after_it_is_turned() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = decode_image(encoded(bands(300, 100, RED, GREEN, BLUE), "JPEG", exif=exif, quality=95), 300, 100)
    assert [max(range(3), key=colour(pixels, row, 50).__getitem__) for row in (20, 150, 280)] == [0, 1, 2]


@pytest.mark.parametrize(
    "picture",
    [
        bands(64, 64, (*RED, 255), (*BLUE, 255), mode="RGBA"),
        bands(64, 64, RED, BLUE).convert("P", palette=Image.Palette.ADAPTIVE),
    ],
    ids=["alpha", "palette"],
)
def test_opaque_colours_survive_other_modes(picture: Image.Image) -> None:
    pixels = decode_image(encoded(picture), 64, 64)
    assert [colour(pixels, 32, 5), colour(pixels, 32, 58)] == [RED, BLUE]


def test_a_half_transparent_palette_is_read() -> None:
    picture = bands(64, 64, RED, BLUE).convert("P", palette=Image.Palette.ADAPTIVE)
    assert decode_image(encoded(picture, transparency=bytes([0, 128])), 64, 64).shape == (3, 64, 64)


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_grey_becomes_three_equal_channels(mode: str) -> None:
    pixels = decode_image(encoded(bands(64, 64, (0, 0, 0), (255, 255, 255)).convert(mode)), 64, 64)
    assert [colour(pixels, 32, 5), colour(pixels, 32, 58)] == [(0, 0, 0), (255, 255, 255)]


def test_16_bit_grey_keeps_its_shades() -> None:
    ramp = np.linspace(0, 65_535, 64).astype(np.uint16)
    pixels = decode_image(encoded(Image.fromarray(np.tile(ramp, (64, 1)))), 64, 64)
    expected = (ramp >> 8).astype(np.float32) / 127.5 - 1
    for channel in pixels:
        np.testing.assert_allclose(channel[32], expected, atol=1e-6)


def test_pixels_are_what_is_normalised() -> None:
    data = encoded(bands(100, 64, RED, (1, 2, 3)))
    pixels = decode_pixels(data, HEIGHT, WIDTH)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (HEIGHT, WIDTH, 3))
    assert np.array_equal(normalise(pixels), decode_image(data, HEIGHT, WIDTH))


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_transparent_parts_show_the_ground_and_not_what_is_under_them(file_format: str) -> None:
    cutout = bands(96, 96, (*RED, 255), (*RED, 128), (*GREEN, 0), mode="RGBA")
    options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
    pixels = decode_pixels(encoded(cutout, file_format, **options), 96, 96)
    assert tuple(pixels[48, 10]) == RED
    assert np.allclose(pixels[48, 48], (192, 64, 64), atol=1)
    assert (pixels[:, 66:] == GROUND).all()


def png_text(size: int, keyword: str = "Comment") -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text(keyword, "a" * size, zip=True)
    return encoded(bands(64, 64, RED, BLUE), pnginfo=info)


@pytest.mark.parametrize("size", [10, 2**21, 2**27])
def test_text_in_a_png_does_not_matter(size: int) -> None:
    assert np.array_equal(decode_pixels(png_text(size), 64, 64), decode_pixels(png_text(1), 64, 64))


def test_an_orientation_behind_the_pixels_of_a_png_is_read() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(bands(300, 100, RED, GREEN, BLUE), exif=exif)
    start = data.index(b"eXIf") - 4
    chunk = data[start : start + 12 + int.from_bytes(data[start : start + 4], "big")]
    moved = data.replace(chunk, b"")
    assert picture_size(moved[:-12] + chunk + moved[-12:]) == (300, 100)


def test_a_number_in_exif_that_cannot_be_written_does_not_matter() -> None:
    """Some phones write an X-resolution of -1/0."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x011A] = 72.0
    data = encoded(bands(300, 100, RED, GREEN, BLUE), "JPEG", exif=exif, quality=95)
    rational = struct.pack(">II", 72, 1) if struct.pack(">II", 72, 1) in data else struct.pack("<II", 72, 1)
    assert rational in data
    order = ">" if rational[:1] == b"\0" else "<"
    assert picture_size(data.replace(rational, struct.pack(f"{order}iI", -1, 0))) == (300, 100)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_an_animation_is_refused(file_format: str) -> None:
    frames = [bands(64, 64, RED, BLUE), bands(64, 64, GREEN, BLUE)]
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match=r"^the reference image is animated \(2 frames\); send a still, such as its"):
        decode_pixels(data, 64, 64)


def test_a_jpeg_with_a_second_picture_inside_is_a_still() -> None:
    frames = [bands(64, 64, RED, BLUE), bands(64, 64, GREEN, BLUE)]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert decode_pixels(data, 64, 64).shape == (64, 64, 3)


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    assert decode_pixels(jpeg_of_scans(64, 40), 64, 64).shape == (64, 64, 3)
    with pytest.raises(
        InputError, match=rf"^the reference image is a JPEG of more than {MAX_SCANS} scans; save it again"
    ):
        decode_pixels(jpeg_of_scans(64, 200), 64, 64)


def test_cmyk_jpeg_is_read() -> None:
    pixels = decode_image(encoded(bands(64, 64, RED, GREEN).convert("CMYK"), "JPEG", quality=95), 64, 64)
    assert int(np.argmax(pixels[:, 32, 5])) == 0
    assert int(np.argmax(pixels[:, 32, 58])) == 1


REFUSED: list[tuple[str, bytes, str]] = [
    ("nothing", b"", r"the reference image has 0 bytes; send an encoded PNG, JPEG or WebP\."),
    (
        "text",
        b"hello, I am a picture",
        r"\(21 bytes, beginning b'hello, I'\) is not a PNG, JPEG or WebP; convert it to one of these\.",
    ),
    ("gif", encoded(bands(64, 64, RED), "GIF"), r"beginning b'GIF8.*is not a PNG, JPEG or WebP; convert it"),
    ("bmp", encoded(bands(64, 64, RED), "BMP"), r"beginning b'BM.*is not a PNG, JPEG or WebP; convert it"),
    (
        "truncated png",
        encoded(Image.effect_noise((64, 64), 50))[:1000],
        r"the reference image \(1000 bytes\) is damaged \(.*\); send the whole file\.",
    ),
    (
        "truncated jpeg",
        encoded(Image.effect_noise((64, 64), 50), "JPEG")[:900],
        r"the reference image \(900 bytes\) is damaged \(.*\); send the whole file\.",
    ),
    ("narrow", encoded(bands(200, 15, RED)), r"is 200x15 pixels; each side needs at least 16\."),
    (
        "large",
        png_header(10_000, 10_000),
        r"is 10000x10000 pixels, more than 64000000 in all; scale it down first\.",
    ),
    ("heavy", bytes(MAX_BYTES + 1), rf"has {MAX_BYTES + 1} bytes, more than {MAX_BYTES}; send a smaller file\."),
]


@pytest.mark.parametrize(("data", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_is_refused_and_how(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        decode_image(data, HEIGHT, WIDTH)


def test_every_truncation_is_an_input_error() -> None:
    data = encoded(Image.effect_noise((32, 32), 50))
    for length in range(0, len(data) - 64, 37):
        with pytest.raises(InputError):
            decode_image(data[:length], HEIGHT, WIDTH)


def peak_memory_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_a_bomb_is_refused_by_its_header() -> None:
    data = png_header(50_000, 50_000)
    before_kib = peak_memory_kib()
    with pytest.raises(InputError, match=r"more than 64000000 pixels in all \(.*2500000000 pixels.*\); scale it down"):
        decode_image(data, HEIGHT, WIDTH)
    assert peak_memory_kib() - before_kib < 64 * 1024  # its pixels would be 7 GiB


def test_the_size_of_a_picture_is_that_of_its_upright_view() -> None:
    exif = Image.Exif()
    assert picture_size(encoded(bands(300, 100, RED))) == (100, 300)
    exif[0x0112] = 6
    assert picture_size(encoded(bands(300, 100, RED), "JPEG", exif=exif)) == (300, 100)
    with pytest.raises(InputError, match=r"is not a PNG, JPEG or WebP; convert it"):
        picture_size(b"hello, I am a picture")


def test_a_picture_of_another_shape_is_warned_of() -> None:
    """A standing person, whose head is in the upper quarter, would have none in a square video."""
    assert crop_warning(encoded(bands(720, 1280, RED)), 96, 96) == (
        "the picture is 720x1280, and the video of 96x96 shows only the 56% in its middle; crop the picture around the "
        "head, or choose a video of its shape."
    )
    assert crop_warning(encoded(bands(1280, 720, RED)), 704, 384) is not None
    assert crop_warning(encoded(bands(300, 400, RED)), 96, 96) is None
    assert crop_warning(encoded(bands(720, 1280, RED)), 704, 384) is None


@pytest.mark.parametrize(
    ("height", "width", "budget", "expected"),
    [
        (704, 384, 704 * 384, (704, 384)),  # fits as it is
        (300, 200, 720 * 400, (320, 256)),  # smaller than the budget: sides rounded up, not enlarged
        (720, 400, 720 * 400, (704, 384)),  # 768 x 448 at scale 1; 704 x 384 below 385 / 400
        (1024, 1024, 720 * 400, (512, 512)),  # 576 x 576 is too large; 512 x 512 below 513 / 1024
        (720, 1280, 720 * 400, (384, 704)),  # 448 x 640 fits below 641 / 1280, but 384 x 704 already below 385 / 720
        (1280, 720, 720 * 400, (704, 384)),
        (3000, 2000, 64 * 64, (64, 64)),
        (1, 288_000, 720 * 400, (64, 4480)),  # a strip: 64 rows leave 4500 columns
        (4_000_000, 16, 64 * 64, (64, 64)),
    ],
)
def test_the_size_within_an_area(height: int, width: int, budget: int, expected: tuple[int, int]) -> None:
    assert area_size(height, width, budget) == expected


SIDES = st.integers(1, 20_000)


@given(SIDES, SIDES, st.integers(64 * 64, 2_000_000))
def test_a_size_is_in_steps_of_64_within_the_area_and_turns_with_the_picture(
    height: int, width: int, budget: int
) -> None:
    size = area_size(height, width, budget)
    assert min(size) >= 64
    assert all(side % 64 == 0 for side in size)
    assert size[0] * size[1] <= budget
    assert area_size(width, height, budget) == size[::-1]


def test_a_picture_of_whole_steps_within_the_area_keeps_its_size() -> None:
    for height in range(64, 1000, 64):
        for width in range(64, 288_000 // height + 1, 64):
            assert area_size(height, width, 288_000) == (height, width)


def test_an_area_below_one_step_and_an_empty_picture_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"an area of 4095 pixels is below 64x64, the smallest video; raise it\."):
        area_size(100, 100, 4095)
    with pytest.raises(InputError, match=r"the picture is 0x100 pixels; each side needs at least 1\."):
        area_size(100, 0, 288_000)
