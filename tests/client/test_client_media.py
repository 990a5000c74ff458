"""Media files: speech in, video out, and files that are not what they should be."""

import json
import wave
from pathlib import Path

import av
import numpy as np
import pytest

from live_avatar_client import InvalidInput, MediaError, read_image_bytes
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
