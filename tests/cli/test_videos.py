"""What the commands make: the same frames from a server as from one process, in a video that is in sync."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest

from live_avatar.arrays import Array
from live_avatar.assets import SPEECH
from live_avatar.config import TINY
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.watermark.embed import Watermark
from live_avatar.watermark.key import Origin, read_key
from live_avatar_client.media import read_speech
from live_avatar_client.protocol import FRAMES_PER_BLOCK
from tests.cli.conftest import SPEECH_SAMPLES
from tests.cli.support import assert_refused, command, frames_of, invoke, run

FRAME_S = 0.04
AAC_PRIMING_S = 1024 / 16_000


def assert_in_sync(path: Path, frames: int) -> None:
    """H.264 and AAC, as many pictures as there are frames, and both as long as each other."""
    with av.open(str(path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
        assert video.average_rate == 25
        assert (audio.rate, audio.channels) == (16_000, 1)
        assert (video.width, video.height) == (TINY.stream.width, TINY.stream.height)
        assert (video.start_time, audio.start_time) == (0, 0)
        times = [picture.time for picture in container.decode(video=0)]
        assert audio.duration is not None
        assert audio.time_base is not None
        heard_s = float(audio.duration * audio.time_base)
    assert times == pytest.approx([number * FRAME_S for number in range(frames)])
    assert abs(heard_s - frames * FRAME_S) <= FRAME_S + AAC_PRIMING_S


def test_generate_writes_video_and_frames(generated: tuple[Path, Array]) -> None:
    folder, frames = generated
    assert frames.dtype == np.uint8
    assert frames.shape == (frames_of(SPEECH_SAMPLES), TINY.stream.height, TINY.stream.width, 3)
    assert_in_sync(folder / "generated.mp4", len(frames))
    assert (frames[1:] != frames[:-1]).any(axis=(1, 2, 3)).all()  # it moves


@pytest.mark.parametrize("pace", ["fast", "realtime"])
def test_stream_writes_the_same_files(
    tmp_path: Path, generated: tuple[Path, Array], image: Path, url: str, pace: str
) -> None:
    folder, frames = generated
    files = ("--audio", folder / "speech.wav", "--image", image, "--output", tmp_path / "a.mp4")
    options = ("--url", url, "--pace", pace, "--prompt", "hello", "--seed", 3, "--frames-output", tmp_path / "a.npy")
    result = invoke("stream", *files, *options)
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "a.npy").read_bytes() == (folder / "generated.npy").read_bytes()
    assert_in_sync(tmp_path / "a.mp4", len(frames))
    wrote, measured = result.stdout.splitlines()
    assert wrote == f"Wrote {tmp_path / 'a.mp4'} ({len(frames)} frames)."
    assert [part.split()[0] for part in measured.split(", ")] == ["FPS", "TTFF", "audio-to-frame"]


def test_generate_without_artifacts_runs_in_torch(
    tmp_path: Path, generated: tuple[Path, Array], inputs: Path, image: Path
) -> None:
    files = ("--audio", inputs / "short.wav", "--image", image, "--output", tmp_path / "a.mp4")
    result = invoke("generate", *files, "--frames-output", tmp_path / "a.npy", "--prompt", "hello", "--seed", 3)
    assert result.exit_code == 0, result.stderr
    frames = np.load(tmp_path / "a.npy")
    assert len(frames) == 1
    # The speech differs after 10 ms only, and the first frame hardly hears it.
    assert np.abs(frames[0].astype(int) - generated[1][0].astype(int)).mean() < 16


def test_bad_sessions_leave_the_others_alone(
    tmp_path: Path, generated: tuple[Path, Array], image: Path, url: str
) -> None:
    folder, frames = generated
    speech = ("--audio", folder / "speech.wav", "--url", url)
    good = ("--image", image, "--prompt", "hello", "--seed", 3, "--pace", "realtime")
    files = ("--output", tmp_path / "a.mp4", "--frames-output", tmp_path / "a.npy")
    other = subprocess.Popen(command("stream", *speech, *good, *files), stdout=subprocess.PIPE, text=True)
    try:
        damaged = tmp_path / "damaged.png"
        data = image.read_bytes()
        for content, sentence in (
            (data[: len(data) // 2], "is damaged (image file is truncated); send the whole file."),
            (data[:8], "is not a PNG, JPEG or WebP; convert it to one of these."),
            (b"\xff\xd8\xff" + bytes(100), "the server refused the session: the reference image (103 bytes"),
        ):
            damaged.write_bytes(content)
            result = invoke("stream", *speech, "--image", damaged, "--output", tmp_path / "bad.mp4")
            assert_refused(result, "the server refused the session: the reference image", sentence)
        result = invoke(
            "stream", *speech, "--image", image, "--prompt", "x" * 100_000, "--output", tmp_path / "bad.mp4"
        )
        assert_refused(result, "prompt has 100000 characters; pass at most 2000")
        result = invoke("stream", *speech, "--image", image, "--prompt", "\udcff", "--output", tmp_path / "bad.mp4")
        assert_refused(result, "prompt cannot be written as UTF-8")
        assert other.wait(60) == 0
    finally:
        other.kill()
        other.communicate()
    assert np.array_equal(np.load(tmp_path / "a.npy"), frames)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "a.npy", "damaged.png"]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("localhost:1", ("no server answered at localhost:1 within 10 s", "check that it runs")),
        ("no.such.host.invalid:8001", ("no server answered at no.such.host.invalid:8001 within 10 s",)),
        ("http://localhost:8001", ("has the scheme 'http', but frames are streamed over gRPC; pass host:port",)),
        ("localhost", ("the address 'localhost' is not host:port; pass one such as 'localhost:8001'",)),
        ("localhost:99999", ("is not host:port; pass one such as",)),
        ("", ("the address '' is not host:port; pass one such as",)),
        ("a b\tc:d", ("is not host:port; pass one such as",)),
    ],
)
def test_nothing_listens_there(tmp_path: Path, inputs: Path, image: Path, address: str, words: tuple[str, ...]) -> None:
    files = ("--audio", inputs / "short.wav", "--image", image, "--output", tmp_path / "a.mp4")
    assert_refused(invoke("stream", "--url", address, *files), *words)
    assert list(tmp_path.iterdir()) == []


def test_a_proxy_does_not_come_between_a_machine_and_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: Path, image: Path, url: str
) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    result = run(
        "stream", "--url", url, "--audio", inputs / "short.wav", "--image", image, "--output", tmp_path / "a.mp4"
    )
    assert result.returncode == 0, result.stderr


def test_the_demo_from_end_to_end(tmp_path: Path, artifacts: Artifacts) -> None:
    video, trace, report = (tmp_path / "new" / name for name in ("demo.mp4", "trace.json", "report.json"))
    result = run("demo", "--artifacts", artifacts.folder, "--output", video, "--trace", trace, "--report", report)
    assert (result.returncode, result.stderr) == (0, "")
    frames = frames_of(len(read_speech(SPEECH)))
    said = {line.split("  ")[0] for line in result.stdout.splitlines()}
    assert {"FPS", "TTFF", "TTFF, speech at hand", "TTFF, known avatar", "Audio-to-frame latency", "Video"} <= said
    assert f"{video} ({frames} frames)" in result.stdout
    assert_in_sync(video, frames)
    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["tid"] for event in events} >= {"conditioning", "dit_step_1", "dit_step_4", "vae_decoder"}
    figures = json.loads(report.read_text())
    assert figures["artifacts"] == {"preset": "tiny", "fingerprint": artifacts.fingerprint}
    assert figures["as_spoken"]["frames"] == figures["as_fast_as_it_goes"]["frames"] == 148
    assert figures["as_fast_as_it_goes"]["fps"] > 0
    assert min(figures[avatar]["ttff_server_s"] for avatar in ("known_avatar", "new_avatar")) > 0
    assert sorted(path.name for path in video.parent.iterdir()) == ["demo.mp4", "report.json", "trace.json"]


def test_generate_marks_and_signs(
    tmp_path: Path, generated: tuple[Path, Array], image: Path, artifacts: Artifacts
) -> None:
    """The frames of `generate` with the mark of the session that it names, in a video whose manifest is valid."""
    folder, frames = generated
    assert invoke("watermark-key", tmp_path / "key").exit_code == 0
    assert invoke("signing-key", "studio", "--folder", tmp_path).exit_code == 0
    files = ("--audio", folder / "speech.wav", "--image", image, "--output", tmp_path / "a.mp4")
    options = ("--prompt", "hello", "--seed", 3, "--artifacts", artifacts.folder, "--frames-output", tmp_path / "a.npy")
    marks = ("--watermark", tmp_path / "key", "--operator", 9)
    signs = ("--sign-certificate", tmp_path / "studio.pem", "--sign-key", tmp_path / "studio.key")
    result = invoke("generate", *files, *options, *marks, *signs)
    assert result.exit_code == 0, result.stderr
    session = int(result.stdout.split("session ")[1][:12], 16)
    mark = Watermark(read_key(tmp_path / "key"), Origin(9, session), TINY.stream.height, TINY.stream.width)
    blocks = range(0, len(frames), FRAMES_PER_BLOCK)
    expected = np.concatenate([mark.apply(frames[first : first + FRAMES_PER_BLOCK], first) for first in blocks])
    assert np.array_equal(np.load(tmp_path / "a.npy"), expected)
    report = json.loads(invoke("verify", tmp_path / "a.mp4", "--trust", tmp_path / "studio-ca.pem", "--json").stdout)
    assert report["manifest"]["state"] == "trusted"
    assert report["claims"]["artifacts"] == artifacts.fingerprint
    assert report["claims"]["session_number"] == f"{session:012x}"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--operator", 3), "--watermark and --operator go together; give both, or none"),
        (("--sign-key", "key"), "--sign-certificate and --sign-key go together; give both, or none"),
        (("--operator", 70_000, "--watermark", "key"), "70000 is not in the range 0<=x<=65535"),
    ],
)
def test_half_of_a_mark_is_refused(inputs: Path, image: Path, options: tuple[object, ...], words: str) -> None:
    files = ("--audio", inputs / "speech.wav", "--image", image, "--output", inputs / "none.mp4")
    assert_refused(invoke("generate", *files, *options), words)
