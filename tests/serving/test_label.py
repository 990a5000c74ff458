"""The visible label: its size and contrast in the pixels, what it leaves alone, and the texts it refuses."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageFont

from live_avatar.arrays import Array
from live_avatar.config import S2V_14B, TINY, Preset
from live_avatar.errors import ConfigError, InputError
from live_avatar.serving.label import LEAST_PIXELS, Label

TEXT = "AI-generated"
SIZES = [(96, 96), (128, 320), (704, 384), (384, 704), (1280, 720)]


def frames(height: int, width: int) -> Array:
    return np.random.default_rng(1).integers(0, 256, (3, height, width, 3), dtype=np.uint8)


def flat(height: int, width: int, value: int) -> Array:
    return np.full((1, height, width, 3), value, dtype=np.uint8)


def box_of(label: Label, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns that the label changes in a white frame."""
    changed = (label.draw(flat(height, width, 255)) != 255).any(axis=(0, 3))
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def luminance(value: Array) -> Array:
    """Of a grey in 0..255, as WCAG 2 defines it."""
    share = value / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_a_capital_letter_has_5_percent_of_the_short_side(height: int, width: int) -> None:
    bright = Label("H", height, width).draw(flat(height, width, 0))[0, :, :, 0] >= 128
    tall = int(bright.any(axis=1).sum())
    least = math.ceil(0.05 * min(height, width))
    assert max(least, LEAST_PIXELS) <= tall <= max(1.25 * least, LEAST_PIXELS + 1)


def test_text_on_a_white_frame_keeps_its_contrast() -> None:
    """WCAG 2 asks 4.5 to 1 of text; white frames are the worst behind white letters."""
    drawn = Label(TEXT, 704, 384).draw(flat(704, 384, 255))[0, :, :, 0]
    box, letters = drawn.min(), drawn[drawn < 255].max()
    assert (1 + 0.05) / (luminance(box) + 0.05) > 4.5
    assert letters > 250, "no letter reaches full white"


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_label_is_in_the_lower_right_corner_and_changes_nothing_else(height: int, width: int) -> None:
    label = Label(TEXT, height, width)
    rows, columns = box_of(label, height, width)
    margin = height - rows.stop
    assert 2 <= margin <= 0.05 * height
    assert width - columns.stop == margin
    assert rows.start > height / 2
    given = frames(height, width)
    drawn = label.draw(given)
    assert drawn.dtype == np.uint8
    assert (drawn[:, rows, columns] != given[:, rows, columns]).mean() > 0.9
    drawn[:, rows, columns] = given[:, rows, columns]
    assert np.array_equal(drawn, given)


def test_frames_given_are_not_changed() -> None:
    given = frames(96, 96)
    kept = given.copy()
    Label(TEXT, 96, 96).draw(given)
    assert np.array_equal(given, kept)


def test_the_same_label_gives_the_same_pixels_and_every_frame_gets_it() -> None:
    given = frames(96, 96)
    label = Label(TEXT, 96, 96)
    assert np.array_equal(label.draw(given), Label(TEXT, 96, 96).draw(given))
    assert np.array_equal(label.draw(given)[1:2], label.draw(given[1:2]))
    assert not np.array_equal(label.draw(given), Label("AI made", 96, 96).draw(given))


@pytest.mark.parametrize("preset", [TINY, S2V_14B], ids=lambda preset: preset.name)
def test_the_usual_label_fits_every_preset(preset: Preset) -> None:
    stream = preset.stream
    assert Label(TEXT, stream.height, stream.width).draw(frames(stream.height, stream.width)).any()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the label '' is blank; give it letters, or leave it out."),
        ("   ", "the label '   ' is blank; give it letters, or leave it out."),
        ("A" * 65, "the label has 65 characters, more than 64; shorten it."),
        ("A\nB", r"the label 'A\nB' has '\n' (U+000A), which is not a printable character; remove it."),
        ("A\0", r"the label 'A\x00' has '\x00' (U+0000), which is not a printable character; remove it."),
        ("A\u202e", r"the label 'A\u202e' has '\u202e' (U+202E), which is not a printable character; remove it."),
        ("A\ud800", r"the label 'A\ud800' has '\ud800' (U+D800), which is not a printable character; remove it."),
        ("A\U0010ffff", "which is not a printable character; remove it."),
        (
            "AI生成",
            "the label 'AI生成' has '生' (U+751F), for which the font Aileron Regular has no glyph; use other "
            "characters, or a server whose label_font has it.",
        ),
        (
            "A" * 64,
            f"the label '{'A' * 64}' takes 393x16 pixels with letters of 7, but frames have 96x96; shorten it.",
        ),
        ("...", "the label '...' is 1 px tall and needs 7 px; begin it with a capital letter."),
    ],
)
def test_texts_that_cannot_be_drawn_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        Label(text, 96, 96)
    assert sentence in str(caught.value)


def test_a_text_of_small_letters_needs_one_that_is_tall_enough() -> None:
    assert Label("made by ai", 96, 96).draw(flat(96, 96, 0)).any()
    with pytest.raises(InputError, match=r"^the label 'xenon' is 6 px tall and needs 7 px; begin it with a capital"):
        Label("xenon", 96, 96)


def test_sixty_four_characters_are_accepted_where_there_is_room() -> None:
    assert Label("A" * 64, 128, 1280).draw(flat(128, 1280, 0)).any()


@pytest.fixture
def font(tmp_path: Path) -> Path:
    """A font file: Pillow's own."""
    path = tmp_path / "letters.ttf"
    path.write_bytes(ImageFont.load_default(10).font_bytes)  # type: ignore[union-attr]
    return path


def test_an_operators_font_is_held_to_the_same_size(font: Path) -> None:
    bright = Label("H", 704, 384, font).draw(flat(704, 384, 0))[0, :, :, 0] >= 128
    assert bright.any(axis=1).sum() >= 20


def test_a_file_that_is_no_font_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.ttf"
    path.write_text("not a font")
    with pytest.raises(ConfigError, match=r"notes\.ttf is not a font \(.*\); give a TrueType or OpenType file as "):
        Label("AI", 96, 96, path)
    with pytest.raises(ConfigError, match=r"missing\.ttf is not a font \(.*\); give a TrueType or OpenType file as "):
        Label("AI", 96, 96, tmp_path / "missing.ttf")
