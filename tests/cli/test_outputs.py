"""Where videos and frames go: whole or not at all, and never in the place of something else."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from live_avatar.graphs.artifacts import Artifacts
from live_avatar_client import InvalidInput, MediaError
from live_avatar_client.video import SpeechVideo
from tests.cli.support import assert_refused, invoke, unprivileged

REMEDY = "pass a path in a folder that exists, is writable and has room"


@contextmanager
def file_size_limit(limit_bytes: int) -> Iterator[None]:
    """Writing beyond it fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("none/a.mp4", "No such file or directory"),
        ("folder", "Is a directory"),
        ("folder/", "Is a directory"),
        ("/", "Is a directory"),
        ("", "Is a directory"),
        ("file/a.mp4", "Not a directory"),
        ("pipe", "Not a regular file"),
        ("a" * 300, "File name too long"),
    ],
)
@pytest.mark.parametrize("option", ["--output", "--frames-output"])
def test_places_that_nothing_can_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: Path, image: Path, option: str, place: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").touch()
    os.mkfifo("pipe")
    before = sorted(os.listdir())
    files = {"--output": "a.mp4", option: place}
    words = [word for pair in files.items() for word in pair]
    result = invoke("generate", "--audio", inputs / "short.wav", "--image", image, "--artifacts", "none", *words)
    assert_refused(result, f"cannot be written: {reason}; {REMEDY}")  # before anything is loaded
    assert sorted(os.listdir()) == before
    assert stat.S_ISFIFO(os.stat("pipe").st_mode)


def test_stream_finds_out_before_it_connects(tmp_path: Path, inputs: Path, image: Path) -> None:
    output = tmp_path / "none" / "a.mp4"
    result = invoke(
        "stream", "--url", "localhost:1", "--audio", inputs / "short.wav", "--image", image, "--output", output
    )
    assert_refused(result, f"the video {str(output)!r} cannot be written: No such file or directory; {REMEDY}")


def test_a_device_stays_a_device(tmp_path: Path, inputs: Path, image: Path) -> None:
    link = tmp_path / "link.mp4"  # so that nothing happens to the device itself if this fails
    link.symlink_to("/dev/full")
    words = ("--audio", inputs / "short.wav", "--image", image, "--output", link)
    assert_refused(invoke("generate", *words), "cannot be written: Not a regular file")
    assert link.is_symlink()
    assert Path("/dev/full").is_char_device()


def test_a_folder_that_one_may_not_write_to(tmp_path: Path, inputs: Path, image: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with unprivileged(), pytest.raises(MediaError, match=f"cannot be written: Permission denied; {REMEDY}"):
        SpeechVideo(closed / "a.mp4", np.zeros(640, np.int16)).__enter__()


def test_a_link_is_followed(tmp_path: Path, artifacts: Artifacts, inputs: Path, image: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "a.mp4"
    link.symlink_to("real/b.mp4")
    words = ("--audio", inputs / "short.wav", "--image", image, "--artifacts", artifacts.folder)
    result = invoke("generate", *words, "--output", link)
    assert result.exit_code == 0, result.stderr
    assert link.is_symlink()
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["b.mp4"]


def test_video_and_frames_need_two_files(tmp_path: Path, inputs: Path, image: Path) -> None:
    output = tmp_path / "a.mp4"
    files = ("--output", output, "--frames-output", tmp_path / ".." / tmp_path.name / "a.mp4")
    result = invoke("generate", "--audio", inputs / "short.wav", "--image", image, *files)
    assert_refused(result, f"video and frames both go to {str(output)!r}; pass two paths")


@pytest.mark.parametrize("limit_bytes", [0, 100, 20_000, 60_000])
@pytest.mark.parametrize("with_frames", [False, True])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, limit_bytes: int, with_frames: bool) -> None:
    video, frames = tmp_path / "a.mp4", tmp_path / "a.npy"
    video.write_bytes(b"before")
    noise = np.random.default_rng(0).integers(0, 256, (25, 64, 64, 3), dtype=np.uint8)

    def write() -> None:
        with SpeechVideo(video, np.zeros(25 * 640, np.int16), frames if with_frames else None) as writer:
            for frame in noise:
                writer.write(frame[np.newaxis])

    with file_size_limit(limit_bytes), pytest.raises(MediaError, match=f"cannot be written: File too large; {REMEDY}"):
        write()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]


def test_an_incomplete_video_does_not_appear(tmp_path: Path) -> None:
    def write(count: int) -> None:
        with SpeechVideo(tmp_path / "a.mp4", np.zeros(3 * 640, np.int16), tmp_path / "a.npy") as video:
            video.write(np.zeros((count, 32, 32, 3), np.uint8))

    with pytest.raises(MediaError, match=r"a.mp4' got 2 frames; 3 were due"):
        write(2)
    with pytest.raises(InvalidInput, match="do not fit"):
        write(4)
    assert list(tmp_path.iterdir()) == []
    write(3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "a.npy"]
