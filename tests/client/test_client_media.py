"""Media files: speech in, video out, and files that are not what they should be."""

import errno
import json
import os
import stat
import struct
import warnings
import wave
from pathlib import Path

import av
import numpy as np
import pytest

from live_avatar_client import AvatarWarning, InvalidInput, MediaError, read_image_bytes
from live_avatar_client.cutter import Samples
from live_avatar_client.media import Mp4Writer, provenance_metadata, read_speech
from live_avatar_client.protocol import MAX_IMAGE_BYTES
from live_avatar_client.testing import SAMPLE_IMAGE, sample_speech
from live_avatar_client.video import SpeechVideo


def tone(samples: int, rate_hz: int = 16_000) -> Samples:
    return (np.sin(np.arange(samples) * 2 * np.pi * 300 / rate_hz) * 12_000).astype(np.int16)


def write_wav(path: Path, samples: Samples, rate_hz: int = 16_000, channels: int = 1) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, 2, rate_hz, 0, "NONE", ""))
        file.writeframes(samples.tobytes())


def write_float_wav(path: Path, samples: np.ndarray) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_f32le", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[np.newaxis].astype(np.float32), "flt", "mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_speech_of_the_right_rate_is_read_as_it_is(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", sample_speech(12_345))
    assert np.array_equal(read_speech(tmp_path / "a.wav"), sample_speech(12_345))


def test_speech_is_resampled_and_mixed(tmp_path: Path) -> None:
    stereo = np.repeat(tone(48_000, 48_000), 2)
    write_wav(tmp_path / "a.wav", stereo, 48_000, channels=2)
    speech = read_speech(str(tmp_path / "a.wav"))
    assert speech.dtype == np.int16
    assert abs(len(speech) - 16_000) <= 2
    middle = slice(1000, 15_000)
    assert np.abs(speech[middle].astype(int) - tone(16_000)[middle]).max() < 400


def write_mp3(path: Path, seconds: int) -> bytes:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libmp3lame", rate=24_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone(seconds * 24_000, 24_000)[np.newaxis], "s16", "mono")
        frame.sample_rate = 24_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path.read_bytes()


def read_quietly(path: Path) -> Samples:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read_speech(path)


def test_damaged_packets_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    whole = write_mp3(path, 3)
    before = read_quietly(path)
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(3) + whole[middle + 200 :])
    with pytest.warns(AvatarWarning, match=r"a.mp3' is damaged; [123] of its \d+ packets are left out"):
        speech = read_speech(path)
    assert 0.9 * len(before) < len(speech) <= len(before)
    assert np.abs(speech).max() > 10_000


def test_answers_that_were_glued_together(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    one = write_mp3(path, 2)
    length = len(read_quietly(path))
    path.write_bytes(one + one)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert abs(len(read_speech(path)) - 2 * length) < 4_000


def test_wav_files_that_were_glued_together(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    write_wav(path, sample_speech(5_000))
    one = path.read_bytes()
    path.write_bytes(one + one)
    with pytest.warns(AvatarWarning, match=r"a.wav' has another WAV file behind its end, which is not read; join"):
        assert len(read_speech(path)) == 5_000
    path.write_bytes(one + b"RIFFRAFF, or any other bytes"[4:])
    assert len(read_quietly(path)) == 5_000


def test_decoders_with_error_codes_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "a.ac3"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ac3", rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone(96_000, 48_000)[np.newaxis] / np.float32(32_768), "fltp", "mono")
        frame.sample_rate = 48_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(2_000) + whole[middle + 2_000 :])
    with pytest.warns(AvatarWarning, match=r"a.ac3' is damaged; \d of its \d\d packets are left out"):
        assert 20_000 < len(read_speech(path)) <= 32_000


def test_packets_that_are_all_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("flac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone(4_096)[np.newaxis], "s16", "mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    whole = path.read_bytes()
    start = whole.index(b"\xff\xf8") + 20
    path.write_bytes(whole[:start] + bytes(len(whole) - start))
    with pytest.raises(MediaError, match=r"a.flac' (cannot be read as audio|has 0 samples)"):
        read_speech(path)


@pytest.mark.parametrize(("left", "right"), [(1.0, -1.0), (0.5, -0.49)])
def test_channels_in_opposite_phase(tmp_path: Path, left: float, right: float) -> None:
    stereo = np.stack([left * tone(16_000), right * tone(16_000)], axis=1)
    write_wav(tmp_path / "a.wav", stereo.astype(np.int16).reshape(-1), channels=2)
    with pytest.warns(AvatarWarning, match="channels that cancel each other out; only channel 1 is used"):
        speech = read_speech(tmp_path / "a.wav")
    assert np.array_equal(speech, (left * tone(16_000)).astype(np.int16))


@pytest.mark.parametrize(("left", "right"), [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (1.0, -0.5)])
def test_other_channels_are_mixed(tmp_path: Path, left: float, right: float) -> None:
    stereo = np.stack([left * tone(16_000), right * tone(16_000)], axis=1)
    write_wav(tmp_path / "a.wav", stereo.astype(np.int16).reshape(-1), channels=2)
    expected = (left + right) / 2 * tone(16_000)
    assert np.abs(read_quietly(tmp_path / "a.wav") - expected).max() <= 2


def write_streams(path: Path, streams: list[Samples], default: int) -> None:
    """Write audio streams of which one is the default."""
    with av.open(str(path), "w") as container:
        encoders = [container.add_stream("aac", rate=16_000, layout="mono") for _ in streams]
        for encoder in encoders:
            encoder.disposition = av.stream.Disposition(int(encoder.index == default))
        for encoder, samples in zip(encoders, streams, strict=True):
            frame = av.AudioFrame.from_ndarray(samples[np.newaxis], "s16", "mono")
            frame.sample_rate = 16_000
            container.mux(encoder.encode(frame))
            container.mux(encoder.encode(None))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_the_default_audio_stream_is_read(tmp_path: Path, name: str) -> None:
    silence = np.zeros(32_000, np.int16)
    write_streams(tmp_path / name, [silence, tone(16_000)], default=1)
    assert np.abs(read_quietly(tmp_path / name)).max() > 10_000
    write_streams(tmp_path / name, [tone(16_000), silence], default=1)
    with pytest.warns(AvatarWarning, match=r"is digitally silent in its audio stream 2 of 2; the mouth will not move"):
        assert not read_speech(tmp_path / name).any()


@pytest.mark.parametrize(
    "name", ["2026-11-29T10:30:00.wav", "http:a.wav", "concat:a|b.wav", "a%03d.wav", "-", "pipe:0", "наш звук.wav"]
)
def test_a_name_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_wav(Path(name), sample_speech(5_000))
    assert np.array_equal(read_quietly(Path(name)), sample_speech(5_000))
    with Mp4Writer(f"{name}.mp4", 32, 32) as video:
        video.write(np.zeros((2, 32, 32, 3), np.uint8))
    assert sorted(os.listdir()) == sorted([name, f"{name}.mp4"])


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff\xfe.wav")
    write_wav(path, sample_speech(5_000))
    assert len(read_quietly(path)) == 5_000
    with Mp4Writer(path.with_suffix(".mp4"), 32, 32) as video:
        video.write(np.zeros((2, 32, 32, 3), np.uint8))
    assert path.with_suffix(".mp4").stat().st_size > 0


def test_a_file_opens_no_other(tmp_path: Path) -> None:
    write_wav(tmp_path / "secret.wav", sample_speech(5_000))
    (tmp_path / "a.wav").write_text("ffconcat version 1.0\nfile secret.wav\n")
    with pytest.raises(MediaError, match="cannot be read as audio"):
        read_speech(tmp_path / "a.wav")


def test_tags_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    write_wav(path, sample_speech(5_000))
    artist = "José Ñuñe".encode("latin-1") + b"\0"
    tags = b"INFOIART" + struct.pack("<I", len(artist)) + artist
    path.write_bytes(path.read_bytes() + b"LIST" + struct.pack("<I", len(tags)) + tags)
    assert np.array_equal(read_quietly(path), sample_speech(5_000))


@pytest.mark.parametrize("rate_hz", [1, 3_999, 768_001])
def test_a_rate_that_no_speech_has(tmp_path: Path, rate_hz: int) -> None:
    write_wav(tmp_path / "a.wav", sample_speech(5_000), rate_hz)
    with pytest.raises(MediaError, match=f"has a sample rate of {rate_hz} Hz, expected 4000 to 768000; save it"):
        read_speech(tmp_path / "a.wav")


def test_float_samples_of_the_scale_of_integers(tmp_path: Path) -> None:
    write_float_wav(tmp_path / "a.wav", tone(16_000).astype(np.float32))
    with pytest.raises(MediaError, match=r"samples of up to 1\d+, expected -1 to 1 at 0.000 s; mend it"):
        read_speech(tmp_path / "a.wav")
    write_float_wav(tmp_path / "a.wav", tone(16_000) / 12_000 * 1.5)
    assert read_quietly(tmp_path / "a.wav").max() == 32_767


def test_silence_is_told(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", np.zeros(5_000, np.int16))
    with pytest.warns(AvatarWarning, match=r"a.wav' is digitally silent in its audio stream 1 of 1"):
        assert len(read_speech(tmp_path / "a.wav")) == 5_000


@pytest.mark.parametrize("size", [(48, 32), (51, 33)])
def test_video_round_trip(tmp_path: Path, size: tuple[int, int]) -> None:
    width, height = size
    frames = np.zeros((47, height, width, 3), np.uint8)
    frames[25:] = 255  # a flash at 1 s, and a tone from there on
    speech = tone(47 * 640 - 100)
    speech[:16_000] = 0
    path = tmp_path / "video.mp4"
    with Mp4Writer(path, width, height, speech=speech, metadata={"title": "t", "comment": "c"}) as video:
        video.write(frames[:12])
        for frame in frames[12:]:
            video.write(frame)
    assert [file.name for file in tmp_path.iterdir()] == ["video.mp4"]
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(str(path)) as container:
        assert (container.metadata["title"], container.metadata["comment"]) == ("t", "c")
        assert container.duration / av.time_base == pytest.approx(47 / 25, abs=0.01)
        assert [s.start_time for s in container.streams] == [0, 0]
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
        pictures = list(container.decode(video=0))
    assert len(pictures) == 47
    assert [picture.time for picture in pictures] == pytest.approx([n / 25 for n in range(47)])
    bright = [picture.to_ndarray(format="gray").mean() > 128 for picture in pictures]
    assert bright.index(True) == 25
    assert all(bright[25:])
    heard = read_speech(path)
    assert abs(int(np.argmax(np.abs(heard.astype(int)) > 4000)) - 16_000) < 160


@pytest.mark.parametrize("size", [(64, 64), (384, 704), (33, 35)])
def test_the_file_says_how_its_colours_are_coded(tmp_path: Path, size: tuple[int, int]) -> None:
    width, height = size
    color = (200, 60, 30)
    with Mp4Writer(tmp_path / "a.mp4", width, height) as video:
        video.write(np.full((3, height, width, 3), color, np.uint8))
    with av.open(str(tmp_path / "a.mp4")) as container:
        coding = container.streams.video[0].codec_context
        marks = (coding.colorspace, coding.color_range, coding.color_primaries, coding.color_trc)
        picture = next(container.decode(video=0))
    assert marks == (1, 1, 1, 1)  # BT.709, limited range
    for decoded in (picture.to_ndarray(format="rgb24"), picture.reformat(format="rgb24", src_colorspace="ITU709")):
        pixels = decoded if isinstance(decoded, np.ndarray) else decoded.to_ndarray()
        assert np.abs(pixels.astype(int) - color).max() <= 3


PROVENANCE = {"generator": "live-avatar", "version": "0.1.0", "preset": "tiny", "seed": 7, "picture_sha256": "ab"}


def test_a_video_says_what_made_it(tmp_path: Path) -> None:
    frames = np.zeros((3, 32, 32, 3), np.uint8)
    path = tmp_path / "a.mp4"
    written: list[np.ndarray] = []

    def metadata() -> dict[str, str]:  # known with the first frames, no sooner
        assert written
        return {"title": "Hello", **provenance_metadata(PROVENANCE)}

    with SpeechVideo(path, tone(3 * 640), metadata=metadata) as video:
        written.append(frames)
        video.write(frames)
    with av.open(str(path)) as container:
        read = dict(container.metadata)
        assert len(list(container.decode(video=0))) == 3
    assert read["title"] == "Hello"
    assert read["comment"] == "AI-generated video: the person in it is animated by live-avatar 0.1.0."
    assert json.loads(read["description"]) == PROVENANCE
    label = json.loads(read["AIGC"])
    assert (label["Label"], label["ContentProducer"]) == ("1", "live-avatar 0.1.0")
    assert len(label["ProduceID"]) == 32
    other = json.loads(provenance_metadata({**PROVENANCE, "seed": 8})["AIGC"])
    assert other["ProduceID"] != label["ProduceID"]


def test_a_speech_video_takes_metadata_as_they_are(tmp_path: Path) -> None:
    with SpeechVideo(tmp_path / "a.mp4", tone(640), metadata={"title": "t"}) as video:
        video.write(np.zeros((1, 32, 32, 3), np.uint8))
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.metadata["title"] == "t"


def test_speech_beyond_the_last_frame_is_left_out(tmp_path: Path) -> None:
    with Mp4Writer(tmp_path / "a.mp4", 32, 32, speech=tone(64_000)) as video:
        video.write(np.zeros((25, 32, 32, 3), np.uint8))
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.duration / av.time_base == pytest.approx(1, abs=0.07)


def test_a_video_without_speech(tmp_path: Path) -> None:
    with Mp4Writer(tmp_path / "a.mp4", 32, 32, fps=10) as video:
        video.write(np.zeros((5, 32, 32, 3), np.uint8))
    assert video.frames == 5
    with pytest.raises(MediaError, match=r"a.mp4' has no audio stream; pass a file with sound"):
        read_speech(tmp_path / "a.mp4")


@pytest.mark.parametrize("frames", [0, 30])
def test_no_partial_file_stays(tmp_path: Path, frames: int) -> None:
    (tmp_path / "a.mp4").write_bytes(b"before")

    def write() -> None:
        with Mp4Writer(tmp_path / "a.mp4", 32, 32, speech=tone(99_999)) as video:
            video.write(np.zeros((frames, 32, 32, 3), np.uint8))
            raise LookupError

    with pytest.raises(LookupError):
        write()
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"before"]


def test_wrong_use_of_the_writer(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with pytest.raises(MediaError, match=r"a.mp4' got 0 frames; write at least one"), Mp4Writer(path, 32, 32):
        pass
    message = r"the frame is uint8 \[32, 30, 3\]; pass uint8 \[32, 32, 3\]"
    with pytest.raises(InvalidInput, match=message), Mp4Writer(path, 32, 32) as video:
        video.write(np.zeros((32, 30, 3), np.uint8))
    message = "cannot be written: No such file or directory; pass a path in a folder that exists, is writable"
    with pytest.raises(MediaError, match=message), Mp4Writer(tmp_path / "none" / "a.mp4", 32, 32):
        pass
    path.mkdir()
    with pytest.raises(MediaError, match="written: Is a directory"), Mp4Writer(path, 32, 32) as video:
        video.write(np.zeros((32, 32, 3), np.uint8))
    path.rmdir()
    with pytest.raises(InvalidInput, match="0 x 32 pixels at 25 fps; pass numbers above 0"):
        Mp4Writer(tmp_path / "a.mp4", 0, 32)
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_speech(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"none.wav' does not exist; pass the path of an audio or video"):
        read_speech(tmp_path / "none.wav")
    with pytest.raises(MediaError, match="is not a file; pass the path"):
        read_speech(tmp_path)
    (tmp_path / "a.wav").write_bytes(b"")
    with pytest.raises(MediaError, match=r"a.wav' cannot be read as audio: .*; pass a file that FFmpeg can"):
        read_speech(tmp_path / "a.wav")
    (tmp_path / "a.txt").write_text("hello " * 500)
    with pytest.raises(MediaError, match=r"a.txt'"):
        read_speech(tmp_path / "a.txt")
    write_wav(tmp_path / "a.wav", np.zeros(0, np.int16))
    with pytest.raises(MediaError, match=r"a.wav'"):
        read_speech(tmp_path / "a.wav")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_speech_that_is_not_finite(tmp_path: Path, bad: float) -> None:
    samples = np.zeros(20_000)
    samples[17_000] = bad
    write_float_wav(tmp_path / "a.wav", samples)
    with pytest.raises(MediaError, match=r"has NaN or infinite samples at [01]\.\d+ s; mend it"):
        read_speech(tmp_path / "a.wav")


def test_images(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(SAMPLE_IMAGE)
    assert read_image_bytes(path) == SAMPLE_IMAGE
    path.write_bytes(b"")
    with pytest.raises(MediaError, match=r"a.png' has 0 bytes; pass a PNG, JPEG or WebP file"):
        read_image_bytes(path)
    path.write_bytes(b"hello")
    with pytest.raises(MediaError, match=r"starts with b'hello', which is no PNG"):
        read_image_bytes(path)
    with path.open("wb") as file:
        file.truncate(MAX_IMAGE_BYTES + 1)
    with pytest.raises(MediaError, match="has more than 33554432 bytes, the limit; save it smaller"):
        read_image_bytes(path)
    with pytest.raises(MediaError, match="is not a file"):
        read_image_bytes(tmp_path)


def write_video(path: Path) -> None:
    with Mp4Writer(path, 32, 32) as video:
        video.write(np.zeros((2, 32, 32, 3), np.uint8))


@pytest.mark.parametrize("length", [4, 241, 250, 255])
def test_a_long_name(tmp_path: Path, length: int) -> None:
    for letter in ("a", "é"):
        name = letter * ((length - 4) // len(letter.encode())) + ".mp4"
        write_video(tmp_path / name)
        assert os.listdir(tmp_path) == [name]
        (tmp_path / name).unlink()


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.touch()
    owner = (1000, 1001) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    os.chown(path, *owner)
    path.chmod(0o640)
    write_video(path)
    after = path.stat()
    assert after.st_size > 0
    assert (stat.S_IMODE(after.st_mode), after.st_uid, after.st_gid) == (0o640, *owner)


def test_a_new_file_has_the_usual_mode(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_video(tmp_path / "a.mp4")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.mp4").stat().st_mode) == 0o640


def test_what_was_private_is_private_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.touch(mode=0o600)
    with Mp4Writer(path, 32, 32) as video:
        video.write(np.zeros((2, 32, 32, 3), np.uint8))
        assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o600}


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EPERM])
def test_a_file_that_cannot_be_replaced_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "replace", refuse)  # as the kernel does for a mount point
    path = tmp_path / "a.mp4"
    path.write_bytes(b"before" * 10_000)
    number = path.stat().st_ino
    write_video(path)
    assert os.listdir(tmp_path) == ["a.mp4"]
    assert path.stat().st_ino == number
    with av.open(str(path)) as container:
        assert len(list(container.decode(video=0))) == 2


def test_a_read_only_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"before")
    monkeypatch.setattr(os, "access", lambda *arguments, **options: False)  # as for root on a read-only mount
    monkeypatch.setattr(os, "supports_effective_ids", set())
    with pytest.raises(MediaError, match=r"a.mp4' cannot be written: The file there is read-only; pass a path"):
        write_video(path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"before"]
