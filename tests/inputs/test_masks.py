"""Masks of speakers: what becomes of them, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from live_avatar.arrays import Array
from live_avatar.errors import InputError
from live_avatar.inputs.image import decode_pixels
from live_avatar.inputs.masks import MAX_MASK_BYTES, check_masks, decode_scene
from tests.support.pictures import encoded

SIZE = (192, 96)
PICTURE = encoded(Image.effect_noise(SIZE, 50).convert("RGB"))
LEFT, RIGHT = b"0,0,96,96", b"96,0,96,96"


def grid_of(*masks: bytes, picture: bytes = PICTURE, height: int = 96, width: int = 192) -> Array:
    """Weights [masks, rows, columns] of tokens."""
    return decode_scene(picture, masks, height, width).weights.reshape(len(masks), height // 16, width // 16)


def drawn(mode: str, ground: int | tuple[int, ...], light: int | tuple[int, ...], box: tuple[int, ...]) -> bytes:
    mask = Image.new(mode, SIZE, ground)  # type: ignore[arg-type]
    mask.paste(light, box)  # type: ignore[arg-type]
    return encoded(mask)


def test_boxes_are_ones_inside_and_zeros_outside() -> None:
    left, right = grid_of(LEFT, RIGHT)
    assert np.array_equal(left, np.repeat([[1.0] * 6 + [0.0] * 6], 6, axis=0))
    assert np.array_equal(right, 1 - left)


def test_a_token_has_the_mean_of_its_pixels() -> None:
    weights = grid_of(b"8,4,100,1")[0]
    assert weights[0, :8] == pytest.approx([8 / 256, *[16 / 256] * 5, 12 / 256, 0])
    assert not weights[1:].any()


def test_masks_may_overlap() -> None:
    both = grid_of(b"0,0,112,96", b"80,0,112,96")
    assert np.array_equal(both[:, 0, 5:7], np.ones((2, 2)))


@pytest.mark.parametrize(
    "mask",
    [
        drawn("L", 0, 255, (96, 0, 192, 96)),
        drawn("1", 0, 1, (96, 0, 192, 96)),
        drawn("RGB", (0, 0, 0), (255, 255, 255), (96, 0, 192, 96)),
        drawn("RGBA", (255, 255, 255, 0), (255, 255, 255, 255), (96, 0, 192, 96)),
        drawn("LA", (255, 0), (255, 255), (96, 0, 192, 96)),
    ],
    ids=["grey", "black and white", "colour", "transparent", "grey, transparent"],
)
def test_a_drawn_mask_is_what_its_box_is(mask: bytes) -> None:
    assert np.array_equal(grid_of(mask), grid_of(RIGHT))


def test_a_grey_mask_is_a_part_of_a_speaker() -> None:
    assert grid_of(drawn("L", 0, 51, (0, 0, 192, 96))) == pytest.approx(np.full((1, 6, 12), 0.2))


def test_masks_are_scaled_and_cropped_as_the_picture_is() -> None:
    """Of 192x96 a square shows the middle: 48 pixels are cut off at each side."""
    picture = encoded(Image.new("RGB", SIZE))
    left, right = grid_of(b"0,0,96,96", b"96,0,96,96", picture=picture, height=64, width=64)
    assert left == pytest.approx(np.repeat([[1.0, 1.0, 0.0, 0.0]], 4, axis=0), abs=0.01)
    assert right == pytest.approx(1 - left, abs=0.01)


def test_a_mask_lies_on_the_picture_as_it_is_seen() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    turned = encoded(Image.effect_noise((96, 192), 50).convert("RGB"), "JPEG", exif=exif)
    assert np.array_equal(grid_of(LEFT, picture=turned), grid_of(LEFT))


def test_pixels_are_those_of_the_picture_alone() -> None:
    scene = decode_scene(PICTURE, (), 96, 192)
    assert np.array_equal(scene.pixels, decode_pixels(PICTURE, 96, 192))
    assert scene.weights.shape == (0, 72)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (encoded(Image.new("L", (96, 192), 255)), "is 96x192 pixels, and the picture 192x96; give a mask of the"),
        (encoded(Image.new("L", SIZE)), "is empty in the part of the picture that the video of 192x96 shows; make"),
        (b"0,0,0,96", "is empty in the part of the picture"),
        (b"97,0,96,96", "is the box 97,0,96,96, which leaves the picture of 192x96 pixels; give x,y,width,height in"),
        (b"0,1,96,96", "is the box 0,1,96,96, which leaves the picture"),
        (b"-1,0,96,96", "begins with b'-1,0,96,96'; give a PNG of the picture's size, or a box in its pixels such as"),
        (b"", "begins with b''; give a PNG"),
        (encoded(Image.new("L", SIZE, 255), "JPEG"), "begins with b'.*'; give a PNG"),
        (encoded(Image.effect_noise(SIZE, 50))[:9000], r"\(9000 bytes\) is damaged"),
    ],
    ids=["size", "black", "box without area", "box outside", "box below", "negative", "nothing", "JPEG", "cut off"],
)
def test_what_is_no_mask_is_refused(mask: bytes, words: str) -> None:
    with pytest.raises(InputError, match=f"^the mask of speaker 1 {words}"):
        decode_scene(PICTURE, (LEFT, mask), 96, 192)


def test_a_mask_beside_the_part_that_is_shown_is_empty() -> None:
    with pytest.raises(InputError, match="speaker 0 is empty in the part of the picture that the video of 64x64 shows"):
        decode_scene(PICTURE, (b"0,0,40,96",), 64, 64)


@pytest.mark.parametrize(
    ("count", "speakers", "words"),
    [
        (
            1,
            1,
            "1 mask came for artifacts of one speaker; leave the masks out, or use artifacts made with `export --sp",
        ),
        (2, 1, "2 masks came for artifacts of one speaker; leave"),
        (0, 2, "0 masks came for artifacts of 2 speakers; give one for each speaker"),
        (1, 2, "1 mask came for artifacts of 2 speakers; give"),
        (3, 2, "3 masks came for artifacts of 2 speakers; give"),
    ],
)
def test_too_many_or_too_few_masks_are_refused(count: int, speakers: int, words: str) -> None:
    with pytest.raises(InputError, match=f"^{words}"):
        check_masks((LEFT,) * count, speakers)


def test_a_mask_of_too_many_bytes_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"the mask of speaker 1 has 1048577 bytes, more than 1048576; save it in grey"
    ):
        check_masks((LEFT, bytes(MAX_MASK_BYTES + 1)), 2)


def test_every_count_that_fits_is_taken() -> None:
    check_masks((), 1)
    check_masks((LEFT, RIGHT), 2)
