"""Speech and pictures: everything that FFmpeg reads is heard, and everything else is refused with a sentence."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import wave
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from live_avatar.graphs.artifacts import Artifacts
from live_avatar_client.media import read_speech
from tests.cli.support import assert_refused, frames_of, invoke, tone, unprivileged, write_audio

MAX_PROMPT_CHARS = 2000
BOMB_SIDE = 50_000
# The interpreter, ONNX Runtime and the graphs; the picture itself would have 7.5 GB.
REFUSAL_MEMORY_LIMIT_BYTES = 1.5e9


@pytest.mark.parametrize(
    ("name", "codec", "rate_hz", "layout"),
    [
        ("8_bit.wav", "pcm_u8", 16_000, "mono"),
        ("16_bit.wav", "pcm_s16le", 8_000, "mono"),
        ("24_bit.wav", "pcm_s24le", 48_000, "mono"),
        ("float.wav", "pcm_f32le", 44_100, "mono"),
        ("double.wav", "pcm_f64le", 16_000, "mono"),
        ("stereo.wav", "pcm_s16le", 44_100, "stereo"),
        ("surround.wav", "pcm_s16le", 48_000, "5.1"),
        ("stereo.mp3", "libmp3lame", 44_100, "stereo"),
        ("stereo.ogg", "libopus", 48_000, "stereo"),
        ("stereo.m4a", "aac", 44_100, "stereo"),
        ("stereo.flac", "flac", 44_100, "stereo"),
        ("stereo.webm", "libopus", 48_000, "stereo"),
    ],
)
def test_any_audio_becomes_16_khz_mono(tmp_path: Path, name: str, codec: str, rate_hz: int, layout: str) -> None:
    path = write_audio(tmp_path / name, tone(1.0, rate_hz), codec, rate_hz, layout)
    speech = read_speech(path)
    assert (speech.dtype.name, speech.ndim) == ("int16", 1)
    assert abs(speech.size - 16_000) <= 1_600  # coded audio ends with a whole packet
    spectrum = np.abs(np.fft.rfft(speech[2_000:10_000].astype(np.float64)))
    assert int(spectrum.argmax()) == 150  # 300 Hz in steps of 2 Hz
    assert 0.3 < np.abs(speech[4_000:8_000]).max() / 32_768 < 1.0


def test_audio_that_changes_its_form_on_the_way(tmp_path: Path) -> None:
    first = write_audio(tmp_path / "a.mp2", tone(1.0, 44_100), "mp2", 44_100)
    second = write_audio(tmp_path / "b.mp2", tone(1.0, 32_000), "mp2", 32_000, "stereo")
    joined = tmp_path / "joined.mp2"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    assert abs(read_speech(joined).size - 32_000) < 1_600


@pytest.mark.parametrize("samples", [1, 160, 641])
def test_short_speech_has_a_frame_for_every_started_40_ms(
    tmp_path: Path, artifacts: Artifacts, image: Path, samples: int
) -> None:
    audio = write_audio(tmp_path / "a.wav", tone(samples / 16_000), "pcm_s16le")
    files = ("--output", tmp_path / "a.mp4", "--frames-output", tmp_path / "a.npy")
    result = invoke("generate", "--artifacts", artifacts.folder, "--audio", audio, "--image", image, *files)
    assert result.exit_code == 0, result.stderr
    assert len(np.load(tmp_path / "a.npy")) == frames_of(samples)


def empty(path: Path) -> None:
    path.touch()


def text(path: Path) -> None:
    path.write_text("Hello, this is not audio.\n" * 50)


def header_only(path: Path) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))


def half_a_header(path: Path) -> None:
    write_audio(path, tone(0.1), "pcm_s16le")
    path.write_bytes(path.read_bytes()[:30])


def with_sample(value: float, codec: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        samples = tone(1.0)
        samples[12_000] = value
        write_audio(path, samples, codec)

    return write


def picture(path: Path) -> None:
    Image.new("RGB", (64, 64)).save(path, format="PNG")


NOT_FINITE = "has NaN or infinite samples at 0."

BAD_AUDIO: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "does not exist; pass the path of an audio or video file"),
    "folder": (Path.mkdir, "is not a file; pass the path of"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is not a file; pass the path of"),
    "dangling": (lambda path: path.symlink_to("nothing"), "does not exist; pass the path of"),
    "circle": (lambda path: path.symlink_to(path), "cannot be read: Too many levels of symbolic links; pass"),
    "empty": (empty, "cannot be read as audio: Invalid data found"),
    "text": (text, "cannot be read as audio: Invalid data found"),
    "header only": (header_only, "has 0 samples; pass a file with sound"),
    "half a header": (half_a_header, "cannot be read as audio"),
    "picture": (picture, "has no audio stream; pass a file with sound"),
    "nan": (with_sample(np.nan, "pcm_f32le"), NOT_FINITE),
    "infinite": (with_sample(np.inf, "pcm_f32le"), NOT_FINITE),
    "minus infinite": (with_sample(-np.inf, "pcm_f64le"), NOT_FINITE),
}


@pytest.mark.parametrize("command", ["generate", "stream"])
@pytest.mark.parametrize("kind", BAD_AUDIO)
def test_bad_audio(tmp_path: Path, image: Path, command: str, kind: str) -> None:
    make, words = BAD_AUDIO[kind]
    audio, output = tmp_path / "speech.wav", tmp_path / "a.mp4"
    make(audio)
    assert_refused(invoke(command, "--audio", audio, "--image", image, "--output", output), f"{str(audio)!r} {words}")
    assert not output.exists()


def test_a_name_that_is_too_long(tmp_path: Path, inputs: Path, image: Path) -> None:
    long = tmp_path / ("a" * 300)
    for audio, picture_path in ((long, image), (inputs / "short.wav", long)):
        result = invoke("generate", "--audio", audio, "--image", picture_path, "--output", tmp_path / "a.mp4")
        assert_refused(result, "cannot be read: File name too long; pass the path of")


@pytest.mark.parametrize("option", ["--audio", "--image"])
def test_files_that_one_may_not_read(tmp_path: Path, inputs: Path, image: Path, option: str) -> None:
    closed = tmp_path / "closed"
    closed.write_bytes(image.read_bytes())
    closed.chmod(0)
    files = {"--audio": inputs / "short.wav", "--image": image, "--output": tmp_path / "a.mp4", option: closed}
    words = [word for pair in files.items() for word in pair]
    assert invoke("generate", *words, "--artifacts", tmp_path / "none").exit_code == 2  # loads what nobody may not
    with unprivileged():
        result = invoke("generate", *words, "--artifacts", tmp_path / "none")
    assert_refused(result, "cannot be read", "Permission denied; pass")


def png(width: int, height: int, data: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def half(image: Path) -> bytes:
    data = image.read_bytes()
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has 0 bytes; pass a PNG, JPEG or WebP file"),
        (b"Hello", "starts with b'Hello', which is no PNG, JPEG or WebP file; save it as one of these"),
        (
            b"GIF89a" + bytes(50),
            r"starts with b'GIF89a\x00\x00', which is no PNG, JPEG or WebP file; save it as one of these",
        ),
        (
            b"BM" + bytes(50),
            r"starts with b'BM\x00\x00\x00\x00\x00\x00', which is no PNG, JPEG or WebP file; save it as one of these",
        ),
        (bytes(33 * 2**20), "has more than 33554432 bytes, the limit; save it smaller"),
    ],
    ids=["empty", "text", "gif", "bmp", "huge"],
)
@pytest.mark.parametrize("command", ["generate", "stream"])
def test_files_that_are_no_pictures(tmp_path: Path, inputs: Path, command: str, content: bytes, words: str) -> None:
    image, output = tmp_path / "image.png", tmp_path / "a.mp4"
    image.write_bytes(content)
    result = invoke(command, "--audio", inputs / "short.wav", "--image", image, "--output", output)
    assert_refused(result, f"{str(image)!r} {words}")


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_no_picture_at_all(tmp_path: Path, inputs: Path, kind: str) -> None:
    image = tmp_path / "none.png" if kind == "missing" else tmp_path
    result = invoke("stream", "--audio", inputs / "short.wav", "--image", image, "--output", tmp_path / "a.mp4")
    assert_refused(
        result, "does not exist" if kind == "missing" else "is not a file", "pass the path of a PNG, JPEG or"
    )


def test_damaged_pictures_and_prompts_that_are_too_long(
    tmp_path: Path, artifacts: Artifacts, inputs: Path, image: Path
) -> None:
    damaged = tmp_path / "damaged.png"
    words = ("--audio", inputs / "short.wav", "--output", tmp_path / "a.mp4", "--artifacts", artifacts.folder)
    for content, sentence in (
        (half(image), "is damaged (image file is truncated); send the whole file."),
        (image.read_bytes()[:8], "is not a PNG, JPEG or WebP; convert it to one of these."),
        (png(9_000, 9_000, b""), "is 9000x9000 pixels, more than 64000000 in all; scale it down first."),
        (png(8, 8, b""), "is 8x8 pixels; each side needs at least 16."),
    ):
        damaged.write_bytes(content)
        assert_refused(invoke("generate", "--image", damaged, *words), sentence)
    long = invoke("generate", "--image", image, *words, "--prompt", "x" * 100_000)
    assert_refused(long, f"the prompt has 100000 characters, more than {MAX_PROMPT_CHARS}; shorten it.")
    assert not (tmp_path / "a.mp4").exists()


def test_a_picture_that_would_fill_the_memory(tmp_path: Path, artifacts: Artifacts, inputs: Path) -> None:
    row = bytes(1 + 3 * BOMB_SIDE)
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(row) for _ in range(500)) + packer.flush()
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png(BOMB_SIDE, BOMB_SIDE, data))
    words = ["--audio", inputs / "short.wav", "--image", bomb, "--output", tmp_path / "a.mp4"]
    program = (
        "from pathlib import Path\nfrom live_avatar.cli.main import main\n"
        "try:\n    main()\nfinally:\n    print(Path('/proc/self/status').read_text())"
    )
    arguments = [sys.executable, "-c", program, "generate", "--artifacts", artifacts.folder, *words]
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "more than 64000000 pixels" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    peak_kib = re.search(r"^VmHWM:\s+(\d+) kB$", done.stdout, re.MULTILINE)  # getrusage has the peak of the parent, too
    assert peak_kib is not None
    assert int(peak_kib[1]) * 1024 < REFUSAL_MEMORY_LIMIT_BYTES
