"""Reads speech from media files and writes frames and speech to MP4 files, with PyAV (extra `media`)."""

import contextlib
import itertools
import json
import os
import struct
import uuid
import warnings
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

try:
    import av
    from av.video.reformatter import ColorRange, Colorspace
except ImportError as error:
    raise ImportError(
        "live_avatar_client.media needs PyAV; install it with: pip install 'live-avatar-client[media]'"
    ) from error

from .cutter import MAX_PEAK, Samples, as_samples
from .errors import AvatarWarning, InvalidInput, MediaError
from .files import FileWriter, OutputFile, require_file
from .image import read_image_bytes
from .messages import Pixels
from .protocol import FPS, SAMPLE_RATE_HZ
from .text import printable

if TYPE_CHECKING:
    from .credentials import ContentCredentials

__all__ = ["Mp4Writer", "provenance_metadata", "read_image_bytes", "read_speech"]

_INPUT_OPTIONS: Final = {"protocol_whitelist": "none"}
_MIN_RATE_HZ, _MAX_RATE_HZ = 4_000, 768_000
_LEAST_MIX_POWER: Final = 0.05**2
"""A mix with less power than this, relative to the loudest channel, has lost its speech."""
_VIDEO_OPTIONS: Final = {"crf": "18", "preset": "veryfast"}
_BT709: Final = 1
"""The number of BT.709 among colour primaries and transfer characteristics (ISO/IEC 23091-2)."""
_AUDIO_BIT_RATE: Final = 96_000
MEDIA_FAULTS: Final = (av.FFmpegError, OSError)


def read_speech(path: str | os.PathLike[str]) -> Samples:
    """Read the speech of any media file as int16 samples, mono, 16 kHz.

    Reads the audio stream that the file marks as the default, otherwise the first. Leaves out damaged packets. If the
    channels cancel each other out when mixed, reads the loudest one alone. Warns (`AvatarWarning`) of each of these,
    and of speech that is digitally silent.
    """
    require_file(path, "speech", "an audio or video file")
    reader = _SpeechReader(path)
    try:
        speech = reader.read()
        if reader.channels_cancel(speech):
            channel = reader.loudest_channel
            speech = reader.read(channel)
            _warn(f"{reader.name} has channels that cancel each other out; only channel {channel + 1} is used")
    except MEDIA_FAULTS as error:
        raise MediaError(
            f"{reader.name} cannot be read as audio: {error.strerror}; pass a file that FFmpeg can read, "
            "such as WAV, FLAC, MP3, Ogg or M4A"
        ) from error
    if not len(speech):
        raise MediaError(f"{reader.name} has 0 samples; pass a file with sound")
    if reader.damaged_packets:
        _warn(f"{reader.name} is damaged; {reader.damaged_packets} of its {reader.packets} packets are left out")
    if reader.is_followed():
        _warn(f"{reader.name} has another WAV file behind its end, which is not read; join them with FFmpeg")
    if not speech.any():
        _warn(f"{reader.name} is digitally silent in {reader.stream}; the mouth will not move")
    return speech


def _warn(sentence: str) -> None:
    warnings.warn(sentence, AvatarWarning, stacklevel=3)


class _SpeechReader:
    """Decodes the speech of one file, and measures its channels."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self.name = f"the speech {os.fspath(path)!r}"
        self.stream = ""
        """Which of the file's audio streams was read, in words."""
        self.packets = 0
        self.damaged_packets = 0
        self._energies = [0.0]
        """Sum of the squared samples of each channel; full scale is 1."""
        self._measured = 0

    def read(self, channel: int | None = None) -> Samples:
        """Return all samples: the mix of all channels, or one channel."""
        self.packets = self.damaged_packets = self._measured = 0
        self._energies = [0.0]
        # FFmpeg gets the open file, because it reads a name with a colon as a protocol. The whitelist keeps a playlist
        # from opening other files. Tags may have any encoding.
        with (
            self._path.open("rb") as file,
            av.open(file, "r", options=_INPUT_OPTIONS, metadata_errors="replace") as container,
        ):
            stream = container.streams.best("audio")
            if not isinstance(stream, av.AudioStream):
                raise MediaError(f"{self.name} has no audio stream; pass a file with sound")
            streams = container.streams.audio
            self.stream = f"its audio stream {streams.index(stream) + 1} of {len(streams)}"
            chunks = list(self._resampled(self._decoded(container, stream), channel))
        speech: Samples = np.concatenate([np.zeros(0, np.int16), *chunks])
        return speech

    def channels_cancel(self, mix: Samples) -> bool:
        """Return whether the mix has lost nearly all of what the loudest channel has."""
        if len(self._energies) == 1 or not len(mix):
            return False
        mix_power = float(np.mean(np.square(mix.astype(np.float32) / 32768)))
        return mix_power < _LEAST_MIX_POWER * max(self._energies) / self._measured

    def is_followed(self) -> bool:
        """Return whether another WAV file was glued to this one: FFmpeg reads the first alone."""
        with self._path.open("rb") as file:
            kind, size, form = struct.unpack("<4sI4s", file.read(12).ljust(12))
            file.seek(8 + size + size % 2)
            return (kind, form) == (b"RIFF", b"WAVE") and file.read(4) == b"RIFF"

    @property
    def loudest_channel(self) -> int:
        """The number of the channel with the most energy, from 0."""
        return int(np.argmax(self._energies))

    def _decoded(self, container: av.container.InputContainer, stream: av.AudioStream) -> Iterator[av.AudioFrame]:
        fault: av.FFmpegError | None = None
        for packet in container.demux(stream):
            self.packets += packet.size > 0
            try:
                frames = packet.decode()
            except av.FFmpegError as error:  # of many kinds: decoders have error codes of their own
                self.damaged_packets += 1
                fault = error
            else:
                yield from frames
        if fault is not None and self.damaged_packets >= self.packets:
            raise fault

    def _resampled(self, frames: Iterator[av.AudioFrame], channel: int | None) -> Iterator[Samples]:
        # The format can change inside a concatenated file, and a resampler accepts only one format.
        for (_, _, rate_hz), group in itertools.groupby(frames, _form):
            if not _MIN_RATE_HZ <= rate_hz <= _MAX_RATE_HZ:
                raise MediaError(
                    f"{self.name} has a sample rate of {rate_hz} Hz, expected {_MIN_RATE_HZ} to {_MAX_RATE_HZ}; "
                    "save it with its true rate"
                )
            to_planar = av.AudioResampler(format="fltp")
            to_speech = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE_HZ)
            for frame in group:
                samples = np.concatenate([planar.to_ndarray() for planar in to_planar.resample(frame)], axis=1)
                self._measure(samples, rate_hz)
                for converted in to_speech.resample(frame if channel is None else _mono(samples, channel, frame)):
                    yield converted.to_ndarray()[0]
            for converted in to_speech.resample(None):
                yield converted.to_ndarray()[0]

    def _measure(self, samples: NDArray[np.float32], rate_hz: int) -> None:
        """Add samples [channels, n] to the energies; raise MediaError for values that are no sound."""
        peak = float(np.abs(samples).max(initial=0.0))
        if not peak <= MAX_PEAK:
            at_s = self._measured / rate_hz
            fault = f"samples of up to {peak:g}, expected -1 to 1" if np.isfinite(peak) else "NaN or infinite samples"
            raise MediaError(f"{self.name} has {fault} at {at_s:.3f} s; mend it")
        for channel, energy in enumerate(np.square(samples, dtype=np.float64).sum(axis=1)):
            self._energies.extend([0.0] * (channel + 1 - len(self._energies)))
            self._energies[channel] += float(energy)
        self._measured += samples.shape[1]


def _mono(samples: NDArray[np.float32], channel: int, frame: av.AudioFrame) -> av.AudioFrame:
    """Return one channel of a frame's samples [channels, n] as a frame."""
    chosen = np.ascontiguousarray(samples[min(channel, len(samples) - 1)][np.newaxis])
    mono = av.AudioFrame.from_ndarray(chosen, format="fltp", layout="mono")
    mono.sample_rate, mono.pts, mono.time_base = frame.sample_rate, frame.pts, frame.time_base
    return mono


def _form(frame: av.AudioFrame) -> tuple[str, str, int]:
    return frame.format.name, frame.layout.name, frame.sample_rate


def provenance_metadata(provenance: Mapping[str, Any]) -> dict[str, str]:
    """Return a video file's metadata from `AvatarSession.provenance`.

    `comment` is a sentence, `description` is the unchanged provenance, and `AIGC` is the implicit label of
    GB 45438-2025: AI-generated (1), the generator, and a number of this video.
    """
    generator = " ".join(printable(str(provenance[key])) for key in ("generator", "version") if key in provenance)
    label = {
        "Label": "1",
        "ContentProducer": generator,
        "ProduceID": uuid.uuid4().hex,
    }
    return {
        "comment": f"AI-generated video: the person in it is animated by {generator or 'a Live Avatar server'}.",
        "description": json.dumps(provenance, sort_keys=True),
        "AIGC": json.dumps(label),
    }


class Mp4Encoder:
    """Encodes frames and their sound into an MP4 of H.264 video and AAC sound, at a path or in a seekable file object.

    H.264 needs even sizes, so the last column or row of a frame of odd width or height is doubled. Colours are coded
    and tagged as BT.709. Errors are those of PyAV and of the file (`MEDIA_FAULTS`). Call `finish` and then `close`, or
    `close` alone to give the file up.
    """

    def __init__(
        self,
        target: str | BinaryIO,
        width: int,
        height: int,
        fps: int = FPS,
        *,
        has_sound: bool,
        metadata: Mapping[str, str],
    ) -> None:
        self.frames = 0
        """How many frames were written."""
        self._fps = fps
        self._samples = 0
        # FFmpeg opens a file a second time to move its index to the front, so only one with a path.
        flags = "+faststart" if isinstance(target, str) else ""
        # Without the last flag MP4 keeps only the entries that FFmpeg has a place for.
        options = {"movflags": f"{flags}+use_metadata_tags"}
        self._container = av.open(target, "w", format="mp4", options=options)
        self._container.metadata.update(metadata)
        self._video = self._container.add_stream("libx264", rate=fps, options=_VIDEO_OPTIONS)
        self._video.width, self._video.height = width + width % 2, height + height % 2
        self._video.pix_fmt = "yuv420p"
        coding = self._video.codec_context
        coding.colorspace, coding.color_range = Colorspace.ITU709, ColorRange.MPEG
        coding.color_primaries = coding.color_trc = _BT709
        self._audio = None
        if has_sound:
            self._audio = self._container.add_stream("aac", rate=SAMPLE_RATE_HZ, layout="mono")
            self._audio.bit_rate = _AUDIO_BIT_RATE

    def write_frame(self, frame: Pixels) -> None:
        """Append a frame [height, width, 3], RGB uint8."""
        height, width, _ = frame.shape
        even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24").reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
        )
        picture.pts, picture.time_base = self.frames, Fraction(1, self._fps)
        self._container.mux(self._video.encode(picture))
        self.frames += 1

    def write_sound(self, samples: Samples) -> None:
        """Append samples, int16 at 16 kHz, to the sound."""
        if self._audio is None or not len(samples):
            return
        sound = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples)[np.newaxis], format="s16", layout="mono")
        sound.sample_rate = SAMPLE_RATE_HZ
        sound.pts, sound.time_base = self._samples, Fraction(1, SAMPLE_RATE_HZ)
        self._container.mux(self._audio.encode(sound))
        self._samples += len(samples)

    def finish(self) -> None:
        """Complete the file."""
        self._container.mux(self._video.encode(None))
        if self._audio is not None:
            self._container.mux(self._audio.encode(None))
        self._container.close()

    def close(self) -> None:
        """Let go of the file, in any state; never raises."""
        with contextlib.suppress(*MEDIA_FAULTS):  # an abandoned file may be incomplete
            self._container.close()


class Mp4Writer(FileWriter):
    """Writes an MP4 file of H.264 video and AAC speech, piece by piece, in a `with` statement.

    The file appears under its name at the normal end of the statement; after an exception there is no file.
    Speech after the last frame is dropped. `Mp4Encoder` says how frames are coded.

    Args:
        path: path of the file; an existing file is replaced.
        width, height: the size of the frames.
        fps: frames per second.
        speech: the speech from the first frame on, in the forms that `AvatarSession.send` takes.
        metadata: entries such as title and comment, or those of `provenance_metadata`.
        credentials: sign the file with a C2PA manifest, which has the provenance of `metadata`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        width: int,
        height: int,
        fps: int = FPS,
        *,
        speech: object | None = None,
        metadata: Mapping[str, str] | None = None,
        credentials: "ContentCredentials | None" = None,
    ) -> None:
        self.path = Path(path)
        super().__init__(OutputFile(path, "video"))
        self.frames = 0
        """How many frames were written."""
        self._shape = (height, width, 3)
        self._fps = fps
        self._speech = None if speech is None else as_samples(speech)
        self._samples_written = 0
        self._metadata = dict(metadata or {})
        self._credentials = credentials
        if min(width, height, fps) < 1:
            raise InvalidInput(f"the video has {width} x {height} pixels at {fps} fps; pass numbers above 0")

    def write(self, frames: Pixels) -> None:
        """Append one frame [height, width, 3] or several [n, height, width, 3], as RGB uint8."""
        for frame in frames if frames.ndim == 4 else frames[np.newaxis]:
            if frame.shape != self._shape or frame.dtype != np.uint8:
                raise InvalidInput(f"the frame is {frame.dtype} {list(frame.shape)}; pass uint8 {list(self._shape)}")
            with self._file.explained(MEDIA_FAULTS):
                self._encoder.write_frame(frame)
                self.frames += 1
                self._encoder.write_sound(self._next_speech())

    def _open(self) -> None:
        height, width, _ = self._shape
        with self._file.explained(MEDIA_FAULTS):
            self._encoder = Mp4Encoder(
                str(self._file.partial),
                width,
                height,
                self._fps,
                has_sound=self._speech is not None,
                metadata=self._metadata,
            )

    def _next_speech(self) -> Samples:
        """The speech up to the end of the last frame."""
        if self._speech is None:
            return np.zeros(0, np.int16)
        start, self._samples_written = self._samples_written, self.frames * SAMPLE_RATE_HZ // self._fps
        return self._speech[start : self._samples_written]

    def _abandon(self) -> None:
        self._encoder.close()

    def _finish(self) -> None:
        if not self.frames:
            raise MediaError(f"the video {str(self.path)!r} got 0 frames; write at least one")
        with self._file.explained(MEDIA_FAULTS):
            self._encoder.finish()
        if self._credentials is not None:
            self._sign(self._credentials)
        self._file.publish()

    def _sign(self, credentials: "ContentCredentials") -> None:
        signed = OutputFile(self.path, "video")
        try:
            with self._file.explained():
                signed.create()
                provenance = json.loads(self._metadata.get("description", "{}"))
                with self._file.partial.open("rb") as old, signed.partial.open("w+b") as new:
                    credentials.sign(old, new, self.path.name, provenance)
                signed.partial.replace(self._file.partial)
        finally:
            signed.discard()
