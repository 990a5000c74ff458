"""The invisible mark: what it changes in frames, and where it is found again."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from live_avatar.arrays import Array
from live_avatar.errors import WatermarkError
from live_avatar.watermark.code import code_of
from live_avatar.watermark.detect import FALSE_ALARM, Evidence, find
from live_avatar.watermark.embed import HALF_PERIOD_FRAMES, Watermark
from live_avatar.watermark.frames import read_frames
from live_avatar.watermark.key import Origin, WatermarkKey, make_key, read_key
from live_avatar_client.media import Mp4Writer
from perf.watermark import encode, faces, psnr
from tests.tolerances import LEAST_PSNR_DB

KEY = WatermarkKey(bytes(range(32)))
ORIGIN = Origin(7, 0x123456789ABC)
LARGE = (400, 720)


@pytest.fixture(scope="module")
def large() -> Array:
    return faces(1, 13, *LARGE)


@pytest.fixture(scope="module")
def marked(large: Array) -> Array:
    return Watermark(KEY, ORIGIN, *LARGE).apply(large, 0)


@pytest.fixture(scope="module")
def small() -> Array:
    return Watermark(KEY, ORIGIN, 96, 96).apply(faces(2, 75, 96, 96), 0)


def evidence(frames: Array) -> Evidence:
    """Of frames uint8 [n, H, W, 3] at 25 a second."""
    seen = Evidence()
    for number, frame in enumerate(frames):
        seen.add(np.asarray(Image.fromarray(frame).convert("L")), number / 25)
    return seen


def found_in(frames: Array, key: WatermarkKey = KEY) -> Origin | None:
    found = find(key, evidence(frames))
    return None if found is None else found.origin


def resized(frame: Array, width: int, height: int) -> Array:
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))


def test_one_frame_carries_all_numbers(marked: Array) -> None:
    assert found_in(marked[:1]) == ORIGIN


def test_the_mark_is_faint_and_frames_given_are_not_changed(large: Array, marked: Array) -> None:
    kept = large.copy()
    again = Watermark(KEY, ORIGIN, *LARGE).apply(large, 0)
    assert np.array_equal(large, kept)
    assert np.array_equal(again, marked), "the same key and numbers make the same frames"
    assert psnr(large, marked) > LEAST_PSNR_DB


def test_the_strongest_mark_is_faint_too() -> None:
    noise = np.random.default_rng(1).integers(0, 256, (1, *LARGE, 3), dtype=np.uint8)
    assert psnr(noise, Watermark(KEY, ORIGIN, *LARGE).apply(noise, 0)) > LEAST_PSNR_DB


def test_black_and_white_pixels_do_not_wrap() -> None:
    frames = np.repeat(np.array([0, 255], np.uint8), 2 * 64 * 64 * 3).reshape(4, 64, 64, 3)
    change = np.abs(Watermark(KEY, ORIGIN, 64, 64).apply(frames, 0).astype(int) - frames)
    assert 0 < change.max() < 12


@pytest.mark.parametrize(("width", "height"), [(360, 200), (1440, 800), (930, 517)])
def test_another_size_is_found(marked: Array, width: int, height: int) -> None:
    assert found_in(resized(marked[0], width, height)[None]) == ORIGIN


def test_a_part_is_found_also_when_stretched(marked: Array) -> None:
    part = marked[0, 17:377, 31:679]
    assert found_in(part[None]) == ORIGIN
    assert found_in(resized(part, 720, 400)[None]) == ORIGIN


def test_a_jpeg_is_found(marked: Array, tmp_path: Path) -> None:
    Image.fromarray(marked[3]).save(tmp_path / "frame.jpg", "JPEG", quality=70)
    seen = read_frames(tmp_path / "frame.jpg")
    found = find(KEY, seen.evidence)
    assert found is not None
    assert (found.origin, seen.evidence.frames, found.alternating) == (ORIGIN, 1, False)
    assert found.z > 20


def test_strong_compression_is_survived(marked: Array, tmp_path: Path) -> None:
    encode(marked, tmp_path / "clip.mp4", 28)
    found = find(KEY, read_frames(tmp_path / "clip.mp4").evidence)
    assert found is not None
    assert found.origin == ORIGIN


def test_a_small_frame_alternates_and_is_found_over_time(small: Array, tmp_path: Path) -> None:
    still = np.full((HALF_PERIOD_FRAMES + 1, 96, 96, 3), 128, np.uint8)
    change = Watermark(KEY, ORIGIN, 96, 96).apply(still, 0).astype(int) - 128
    assert np.array_equal(change[0], change[HALF_PERIOD_FRAMES - 1])
    assert np.array_equal(change[0], -change[HALF_PERIOD_FRAMES])
    encode(small[5:], tmp_path / "clip.mp4", 23)
    found = find(KEY, read_frames(tmp_path / "clip.mp4").evidence)
    assert found is not None
    assert (found.origin, found.alternating) == (ORIGIN, True)


def test_one_small_frame_is_not_enough(small: Array) -> None:
    assert found_in(small[:1]) is None


def test_blocks_make_the_frames_of_the_whole(large: Array) -> None:
    """A server marks block after block."""
    whole = Watermark(KEY, ORIGIN, *LARGE).apply(large, 0)
    mark = Watermark(KEY, ORIGIN, *LARGE)
    parts = np.concatenate([mark.apply(large[:12], 0), mark.apply(large[12:], 12)])
    assert np.array_equal(parts, whole)


@pytest.mark.parametrize(("operator", "session"), [(0, 0), (65_535, 2**48 - 1)])
def test_every_number_is_read_again(operator: int, session: int) -> None:
    flat = np.full((1, 288, 384, 3), 128, np.uint8)
    origin = Origin(operator, session)
    assert found_in(Watermark(KEY, origin, 288, 384).apply(flat, 0)) == origin


# ---- What is no mark of the key


def test_frames_without_a_mark_have_none(large: Array) -> None:
    assert found_in(large[:3, :200, 200:520]) is None


def test_another_key_finds_nothing(marked: Array) -> None:
    assert found_in(marked[:3, :200, 200:520], WatermarkKey(bytes(32))) is None


@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_flat_picture_has_none(value: int) -> None:
    assert found_in(np.full((30, 96, 96, 3), value, np.uint8)) is None


def test_the_chance_of_a_false_alarm_is_below_one_in_a_million() -> None:
    assert FALSE_ALARM < 1e-6


def test_bytes_whose_check_is_wrong_are_no_numbers() -> None:
    symbols = KEY.symbols(ORIGIN).copy()
    assert KEY.origin(symbols) == ORIGIN
    for place in range(len(symbols)):
        changed = symbols.copy()
        changed[place] ^= 1
        assert KEY.origin(changed) is None


def test_two_keys_have_two_patterns() -> None:
    one, other = (code_of(key).tile(key.symbols(ORIGIN)) for key in (KEY, WatermarkKey(bytes(32))))
    assert abs(np.mean(one * other)) < 0.2


# ---- Files


def test_a_file_of_a_key_is_read_again_and_private(tmp_path: Path) -> None:
    made = make_key(tmp_path / "key")
    assert read_key(tmp_path / "key") == made
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert made.secret.hex() not in repr(made)


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    make_key(tmp_path / "key")
    with pytest.raises(
        WatermarkError, match=r"exists; a key that marked videos must be kept, so give the name of a new"
    ):
        make_key(tmp_path / "key")


@pytest.mark.parametrize("content", [b"", b"live-avatar-watermark:12", b"\xff" * 100, b"x" * 10_000])
def test_a_file_that_is_no_key_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(WatermarkError, match=r"holds no watermark key; expected one line.*live-avatar watermark-key"):
        read_key(tmp_path / "key")


def test_a_key_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WatermarkError, match=r"cannot be read \(No such file or directory\); make one with"):
        read_key(tmp_path / "key")


@pytest.mark.parametrize(("operator", "session", "words"), [(-1, 0, "operator's"), (1, 2**48, "session's")])
def test_numbers_out_of_bounds_are_refused(operator: int, session: int, words: str) -> None:
    with pytest.raises(WatermarkError, match=words):
        Origin(operator, session)


@pytest.mark.parametrize("content", [b"", b"This is text.\n" * 50, bytes(1000)])
def test_a_file_without_a_picture_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.mp4").write_bytes(content)
    with pytest.raises(WatermarkError, match=r"is no video or picture that can be read .* give an MP4, JPEG or PNG"):
        read_frames(tmp_path / "file.mp4")


def test_a_sound_file_is_refused(tmp_path: Path) -> None:
    from live_avatar.assets import SPEECH

    with pytest.raises(
        WatermarkError, match=r"speech.wav is no video or picture that can be read \(it has no picture\)"
    ):
        read_frames(Path(str(SPEECH)))


def test_a_truncated_video_is_read_as_far_as_it_goes(marked: Array, tmp_path: Path) -> None:
    with Mp4Writer(tmp_path / "whole.mp4", 720, 400) as video:
        video.write(marked)
    content = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "part.mp4").write_bytes(content[: len(content) * 9 // 10])
    seen = read_frames(tmp_path / "part.mp4")
    assert seen.damaged
    assert 0 < seen.evidence.frames < len(marked)
    found = find(KEY, seen.evidence)
    assert found is not None
    assert found.origin == ORIGIN


def test_a_large_picture_is_reduced(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (3000, 2000)).save(buffer, "PNG")
    (tmp_path / "large.png").write_bytes(buffer.getvalue())
    seen = read_frames(tmp_path / "large.png")
    assert (seen.step, seen.evidence.shape) == (2, (1000, 1500))
