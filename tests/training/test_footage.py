"""Any file becomes frames at 25 fps that are upright, with its speech at its time; what cannot be used is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from live_avatar.arrays import Array
from tests.support.films import grey_frames, tone, write_video
from training.data.clips import Split, make_clip
from training.films import write_film
from training.videos.footage import FootageError, frames_of, open_footage

LEVELS = (20, 60, 100, 140, 180, 220)


def levels(path: Path) -> list[int]:
    """The grey of every frame at 25 fps, to the next of `LEVELS`."""
    footage = open_footage(path)
    seen = [frame.mean() for frame in frames_of(footage, 64, 64)]
    return [min(LEVELS, key=lambda level: abs(level - one)) for one in seen]


def film(path: Path, times_ms: list[int] | None = None, seconds: float = 2.0) -> Path:
    return write_video(path, grey_frames(LEVELS), times_ms, {"eng": tone(seconds)})


def test_a_file_at_25_fps_is_read_frame_by_frame(tmp_path: Path) -> None:
    assert levels(film(tmp_path / "a.mp4")) == list(LEVELS)


def test_a_variable_frame_rate_keeps_its_time(tmp_path: Path) -> None:
    """Frame i is the last one that begins before the middle of its 40 ms."""
    path = film(tmp_path / "a.mkv", [0, 30, 70, 200, 250, 290])
    assert levels(path)[:8] == [20, 60, 100, 100, 100, 140, 180, 220]


def test_fifty_frames_a_second_become_every_second_one(tmp_path: Path) -> None:
    assert levels(film(tmp_path / "a.mkv", [0, 20, 40, 60, 80, 100]))[:3] == [20, 100, 180]


@pytest.mark.parametrize(("rotation", "white"), [(90, "bottom"), (-90, "top"), (180, "right")])
def test_a_rotation_flag_turns_the_picture(tmp_path: Path, rotation: int, white: str) -> None:
    """By so many degrees against the clock, as a player shows it; the left half of the coded picture is white."""
    frames = np.zeros((4, 64, 96, 3), np.uint8)
    frames[:, :, :48] = 255
    path = write_video(tmp_path / "a.mp4", frames, None, {"eng": tone(1.0)}, rotation)
    frame = next(frames_of(open_footage(path), 64, 64)).astype(int).mean(2)
    halves = {"top": frame[:24], "bottom": frame[40:], "left": frame[:, :24], "right": frame[:, 40:]}
    assert halves[white].mean() > 240
    opposite = {"top": "bottom", "bottom": "top", "right": "left"}[white]
    assert halves[opposite].mean() < 15


def test_pixels_that_are_not_square_are_stretched(tmp_path: Path) -> None:
    path = write_video(
        tmp_path / "a.mkv", grey_frames(LEVELS), None, {"eng": tone(1.0)}, options={"x264-params": "sar=2/1"}
    )
    footage = open_footage(path)
    assert footage.size == (64, 192)
    assert next(frames_of(footage, 32, 96)).shape == (32, 96, 3)


def test_speech_stands_at_its_time(tmp_path: Path) -> None:
    """Sound that begins 80 ms after the picture is not moved to its start, and sound before it is cut."""
    frames, sound = grey_frames(LEVELS * 5), tone(0.5)
    late = open_footage(write_video(tmp_path / "a.mkv", frames, None, {"eng": sound}, sound_at_ms=80))
    assert not late.speech[:1280].any()
    assert np.array_equal(late.speech[1280 : 1280 + 4000], sound[:4000])
    times = [200 + 40 * index for index in range(len(frames))]
    early = open_footage(write_video(tmp_path / "b.mkv", frames, times, {"eng": sound}))
    assert np.array_equal(early.speech[:4000], sound[3200:7200])


def test_a_film_of_a_drawn_clip_has_its_frames_and_speech(tmp_path: Path) -> None:
    clip = make_clip(Split.TRAIN, 0, 2, 64)
    write_film(tmp_path / "a.mp4", clip)
    footage = open_footage(tmp_path / "a.mp4")
    frames = np.stack(list(frames_of(footage, 64, 64))).astype(float)
    assert (footage.frames, footage.seconds) == (24, pytest.approx(0.96))
    assert np.abs(frames - clip.frames).mean() < 4  # levels of 255, of H.264 with halved colours
    assert best_shift(footage.speech, clip.speech) == 0


def best_shift(heard: Array, spoken: Array) -> int:
    """The shift in samples at which two sounds agree best."""
    count = min(len(heard), len(spoken))
    products = np.fft.irfft(np.fft.rfft(heard[:count]) * np.conj(np.fft.rfft(spoken[:count])))
    shift = int(products.argmax())
    return shift if shift <= count // 2 else shift - count


def test_of_two_languages_the_default_or_the_named_one_is_heard(tmp_path: Path) -> None:
    path = write_video(
        tmp_path / "a.mkv", grey_frames(LEVELS * 5), None, {"eng": tone(1.0), "deu": tone(1.0, hertz=880)}
    )
    english, german = open_footage(path), open_footage(path, "deu")
    assert english.track == "1 of 2 (eng)"
    assert german.track == "2 of 2 (deu)"
    crossings = [int((np.diff(np.sign(one.speech[:8000].astype(int))) != 0).sum()) for one in (english, german)]
    assert crossings[1] > 3 * crossings[0]
    with pytest.raises(FootageError, match=r"a.mkv has no sound track in 'fra', only in eng, deu; give another"):
        open_footage(path, "fra")


def test_a_video_without_sound_is_named(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", grey_frames(LEVELS))
    with pytest.raises(FootageError, match=r"a.mp4 has no sound track; its speech is needed, so leave the file out\."):
        open_footage(path)


def test_sound_alone_is_named(tmp_path: Path) -> None:
    import av

    with av.open(str(tmp_path / "a.m4a"), "w") as file:
        stream = file.add_stream("aac", rate=16_000, layout="mono")
        sound = av.AudioFrame.from_ndarray(tone(0.5)[None], format="s16", layout="mono")
        sound.sample_rate = 16_000
        file.mux(stream.encode(sound))
        file.mux(stream.encode(None))
    with pytest.raises(FootageError, match=r"a.m4a has no video stream; give a video, such as MP4"):
        open_footage(tmp_path / "a.m4a")


@pytest.mark.parametrize("content", [b"", b"This is a text.\n" * 400, b"#EXTM3U\n#EXTINF:1,\nother.ts\n"])
def test_a_file_that_is_no_video_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(FootageError, match=r"a.mp4 (cannot be read as a video \(.+\); make the file again|has no vid)"):
        open_footage(path)


def test_a_file_of_50_gb_without_content_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with path.open("wb") as file:
        file.truncate(50 * 10**9)
    with pytest.raises(FootageError, match=r"a.mp4 cannot be read as a video"):
        open_footage(path)


def test_a_video_of_5_ms_is_one_frame_at_most(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", grey_frames(LEVELS[:1]), [0], {"eng": tone(0.005)})
    assert open_footage(path).frames == 1


def test_a_file_that_is_cut_off_is_named(tmp_path: Path) -> None:
    whole = film(tmp_path / "a.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FootageError, match=r"b.mp4 cannot be read as a video"):
        open_footage(tmp_path / "b.mp4")
