"""The measurement of other libraries for marks, with a mark made by hand: none of them is installed here."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from live_avatar.arrays import Array
from perf.watermark_libraries import ATTACKS, BITS, main, measure, table


def put(picture: Array, bits: Array) -> Array:
    """Each bit shows as a bright or a dark column of a corner that a crop cuts off."""
    marked = picture.copy()
    marked[:20, :BITS] = 255 * bits[None, :, None]
    return marked


def get(picture: Array) -> Array:
    return picture[:20, :BITS].mean(axis=(0, 2)) > 127


def test_wrong_bits_are_counted_after_each_attack() -> None:
    measured = measure(put, get, np.full((200, 320, 3), 120, np.uint8))
    assert set(measured["wrong"]) == set(ATTACKS)
    assert measured["wrong"]["JPEG 70"] == 0
    assert measured["wrong"]["10 % crop"] > 16, "the corner is gone"
    assert 10 < measured["psnr_db"] < 40
    assert "| 10 % crop |" in table({"by hand": measured}).splitlines()[0]


@pytest.mark.skipif(find_spec("imwatermark") is not None, reason="the libraries are installed")
def test_without_the_libraries_it_says_what_to_do(tmp_path: Path) -> None:
    Image.new("RGB", (720, 400)).save(tmp_path / "a.png")
    result = CliRunner().invoke(main, ["--photograph", str(tmp_path / "a.png")])
    assert result.exit_code == 1
    assert "is not installed; install the libraries as the head of this module says" in result.output
