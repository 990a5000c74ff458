"""The README's animated picture: made from a video, repeated without end, and small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from live_avatar_client.media import Mp4Writer
from perf import animate
from perf.animate import main


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """One second of noise, 25 frames."""
    path = tmp_path / "video.mp4"
    frames = np.random.default_rng(0).integers(0, 256, (25, 48, 96, 3), dtype=np.uint8)
    with Mp4Writer(path, 96, 48) as writer:
        writer.write(frames)
    return path


def refusal(*options: str | Path) -> str:
    result = CliRunner().invoke(main, [str(option) for option in options])
    assert result.exit_code == 1, result.output
    return result.output


@pytest.mark.parametrize("suffix", ["webp", "gif"])
def test_the_picture_has_the_videos_frames_at_the_given_rate(video: Path, tmp_path: Path, suffix: str):
    output = tmp_path / "new" / f"picture.{suffix}"
    result = CliRunner().invoke(main, ["--video", str(video), "--output", str(output), "--size", "192"])
    assert result.exit_code == 0, result.output
    with Image.open(output) as picture:
        assert picture.size == (192, 96)
        assert getattr(picture, "n_frames") == 13  # noqa: B009 - Image declares it in subclasses only
        picture.seek(0)
        picture.load()
        assert picture.info["duration"] == 80
        assert picture.info["loop"] == 0


def test_a_video_that_cannot_be_read_is_refused(tmp_path: Path):
    output = tmp_path / "picture.webp"
    missing, text = tmp_path / "missing.mp4", tmp_path / "text.mp4"
    text.write_text("no video")
    assert "missing.mp4 does not exist; run live-avatar demo" in refusal("--video", missing, "--output", output)
    assert "text.mp4 as a video (" in refusal("--video", text, "--output", output)
    assert not output.exists()


def test_another_kind_of_file_and_a_rate_above_the_videos_are_refused(video: Path, tmp_path: Path):
    assert "expected one of .webp, .gif" in refusal("--video", video, "--output", tmp_path / "picture.png")
    slow = tmp_path / "slow.mp4"
    with Mp4Writer(slow, 96, 48, fps=5) as writer:
        writer.write(np.zeros((5, 48, 96, 3), np.uint8))
    said = refusal("--video", slow, "--output", tmp_path / "picture.webp")
    assert "has 5 frames a second, fewer than 12.5; give --fps 5 or less" in said


def test_a_picture_that_is_too_large_is_not_left_behind(video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(animate, "MAX_BYTES", 1_000)
    output = tmp_path / "picture.webp"
    assert "expected fewer than 1,000; lower --size or --fps" in refusal("--video", video, "--output", output)
    assert not output.exists()
