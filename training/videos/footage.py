"""Reads a video file as training needs it: upright frames at 25 fps, and the speech that belongs to them.

Frame i is what a player shows in the middle of 40 i..40 (i + 1) ms after the first frame, so a variable frame rate
keeps its time. Speech is placed by its timestamps on the same clock: sound that begins late, or has a hole, does not
shift.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from live_avatar.arrays import Array
from live_avatar.config import FPS, SAMPLE_RATE_HZ, SAMPLES_PER_FRAME
from live_avatar.errors import InputError
from live_avatar.inputs.image import fitted

OPTIONS = {"protocol_whitelist": "none"}  # keeps a playlist from opening other files
STILLS = frozenset({"image2", "png_pipe", "jpeg_pipe", "webp_pipe", "bmp_pipe", "tiff_pipe", "gif_pipe", "tty"})
"""Containers of FFmpeg that hold pictures or text: no videos, though it gives them a video stream."""
EARLY = 1e-4  # frames; of two frames at the same distance from the middle the earlier one is taken
JUMP_S = 0.06  # a break in the sound's timestamps; smaller ones are rounding, or the codec's own delay
MOST_SPEECH_S = 6 * 3600  # 0.7 GB
SIDES = (16, 16_384)  # pixels


class FootageError(InputError):
    """A video file that cannot be used: unreadable, damaged, without sound or without picture."""


@dataclass(frozen=True)
class Footage:
    """A video file.

    start_s: the timestamp of its first frame; seconds: of its picture. size: height and width of the coded picture with
    square pixels, before it is turned upright. speech int16 [n * 640]: 16 kHz mono, of n whole frames. track: the
    sound's track, in words.
    """

    path: Path
    start_s: float
    seconds: float
    size: tuple[int, int]
    speech: Array
    track: str

    @property
    def frames(self) -> int:
        """Number of frames at 25 fps that sound and picture both cover."""
        return len(self.speech) // SAMPLES_PER_FRAME


def open_footage(path: Path, language: str | None = None) -> Footage:
    """Reads the timestamps and the sound of a file; no frame is decoded.

    Of several sound tracks it takes the first one whose tag is `language` (three letters, ISO 639-2), or without
    `language` the one that the file marks as its default, or else the first. Raises `FootageError`.
    """
    try:
        with _opened(path) as container:
            start_s, seconds = _span(container, path)
            size = _size(container.streams.video[0], path)
            index, track = _track(container, path, language)
        with _opened(path) as container:
            speech = _speech(container, container.streams[index], start_s, path)
    except (av.FFmpegError, OSError, ValueError, OverflowError) as error:
        raise _unreadable(path, error) from error
    frames = min(round(seconds * FPS), math.ceil(len(speech) / SAMPLES_PER_FRAME))
    covered = np.zeros(frames * SAMPLES_PER_FRAME, np.int16)
    covered[: len(speech)] = speech[: len(covered)]
    return Footage(path, start_s, seconds, size, covered, track)


def frames_of(footage: Footage, height: int, width: int, start: int = 0, stop: int | None = None) -> Iterator[Array]:
    """The frames at 25 fps, uint8 [height, width, 3], scaled to cover and cropped in the middle as a picture is.

    start, stop: of the frames, without which all are given. Raises `FootageError` where the file is damaged.
    """
    try:
        with _opened(footage.path) as container:
            shown = _at_25_fps(_decoded(container, footage), footage.frames)
            for frame in itertools.islice(shown, start, stop):
                yield _fitted(frame, footage, height, width)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise _unreadable(footage.path, error) from error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """FFmpeg gets the open file, because it would read a name with a colon as a protocol."""
    with path.open("rb") as file, av.open(file, "r", options=OPTIONS, metadata_errors="replace") as container:
        yield container


def _unreadable(path: Path, error: Exception) -> FootageError:
    if isinstance(error, FootageError):
        return error
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return FootageError(f"{path} cannot be read as a video ({reason}); make the file again, or leave it out.")


def _span(container: Any, path: Path) -> tuple[float, float]:
    """Time of the first frame, and seconds from it to the end of the last, by the packets' timestamps."""
    if set(container.format.name.split(",")) & STILLS or not container.streams.video:
        raise FootageError(f"{path} has no video stream; give a video, such as MP4, MOV, MKV or WebM.")
    stream = container.streams.video[0]
    first, last, count = math.inf, -math.inf, 0
    usual = 1 / float(stream.average_rate or FPS)
    for packet in container.demux(stream):
        if packet.pts is None or not packet.size or packet.is_discard:
            continue
        time_s = float(packet.pts * packet.time_base)
        held_s = float(packet.duration * packet.time_base) if packet.duration else usual
        first, last, count = min(first, time_s), max(last, time_s + held_s), count + 1
    if not count:
        raise FootageError(f"{path} has 0 frames with a time; give a video, such as MP4, MOV, MKV or WebM.")
    return first, last - first


def _size(stream: Any, path: Path) -> tuple[int, int]:
    """Height and width of the coded picture with square pixels; it is turned upright frame by frame."""
    context = stream.codec_context
    ratio = stream.sample_aspect_ratio or Fraction(1)
    height, width = context.height, round(context.width * float(ratio if ratio > 0 else 1))
    if not SIDES[0] <= min(height, width) <= max(height, width) <= SIDES[1]:
        raise FootageError(
            f"{path} is {width}x{height} pixels; each side needs {SIDES[0]} to {SIDES[1]}: scale the video."
        )
    return height, width


def _track(container: Any, path: Path, language: str | None) -> tuple[int, str]:
    """Index of the stream of the sound, and which one it is in words."""
    tracks = list(container.streams.audio)
    if not tracks:
        raise FootageError(f"{path} has no sound track; its speech is needed, so leave the file out.")
    if language is None:
        chosen = container.streams.best("audio") or tracks[0]
    else:
        spoken = [track for track in tracks if track.language == language]
        if not spoken:
            found = ", ".join(track.language or "none" for track in tracks)
            raise FootageError(
                f"{path} has no sound track in {language!r}, only in {found}; give another language, or leave the "
                "file out."
            )
        chosen = spoken[0]
    return chosen.index, f"{tracks.index(chosen) + 1} of {len(tracks)} ({chosen.language or 'no language'})"


def _speech(container: Any, stream: Any, start_s: float, path: Path) -> Array:
    """The track from the picture's first frame on, with silence where it has no sound."""
    pieces: list[tuple[int, Array]] = []
    end = 0
    for time_s, samples in _runs(container, stream):
        at = round((time_s - start_s) * SAMPLE_RATE_HZ)
        end = max(end, at + len(samples))
        if end > MOST_SPEECH_S * SAMPLE_RATE_HZ:
            raise FootageError(f"{path} has more than {MOST_SPEECH_S // 3600} h of sound; cut it into shorter files.")
        pieces.append((at, samples))
    if not end > 0:
        raise FootageError(f"{path} has no sound beside its picture; its speech is needed, so leave the file out.")
    speech = np.zeros(end, np.int16)
    for at, samples in pieces:
        kept = samples[max(0, -at) :]
        speech[max(0, at) : max(0, at) + len(kept)] = kept
    return speech


def _runs(container: Any, stream: Any) -> Iterator[tuple[float, Array]]:
    """Runs of sound without a break: the time of each, and its samples at 16 kHz."""
    resampler, expected_s, began_s = None, 0.0, 0.0
    form: tuple[Any, ...] = ()
    kept: list[Array] = []
    for frame in container.decode(stream):
        time_s = expected_s if frame.pts is None else float(frame.pts * frame.time_base)
        new_form = (frame.format.name, frame.layout.name, frame.sample_rate)
        if resampler is None or new_form != form or abs(time_s - expected_s) > JUMP_S:
            if resampler is not None:
                yield began_s, np.concatenate([*kept, *_resampled(resampler, None)])
            resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE_HZ)
            kept, began_s, form = [], time_s, new_form
        expected_s = time_s + frame.samples / frame.sample_rate
        frame.pts = None  # the resampler would stretch the sound to follow small steps of the timestamps
        kept += _resampled(resampler, frame)
    if resampler is not None:
        yield began_s, np.concatenate([*kept, *_resampled(resampler, None)])


def _resampled(resampler: av.AudioResampler, frame: av.AudioFrame | None) -> list[Array]:
    return [np.zeros(0, np.int16), *(one.to_ndarray()[0] for one in resampler.resample(frame))]


def _decoded(container: Any, footage: Footage) -> Iterator[tuple[float, Any]]:
    """Times in frames of 25 fps from the file's first frame on, whether it can be decoded or not, and frames."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    usual = 1 / float(stream.average_rate or FPS)
    last_s = footage.start_s - usual
    for frame in container.decode(stream):
        time_s = last_s + usual if frame.pts is None else float(frame.pts * frame.time_base)
        last_s = time_s
        if frame.is_corrupt:
            raise FootageError(f"{footage.path} is damaged at {time_s - footage.start_s:.2f} s; make the file again.")
        yield (time_s - footage.start_s) * FPS, frame


def _at_25_fps(decoded: Iterator[tuple[float, Any]], count: int) -> Iterator[Any]:
    """`count` frames, each the last one that begins before the middle of its time; the last one is held."""
    shown: Any = None
    made = 0
    for at, frame in decoded:
        while shown is not None and made < count and at > made + 0.5 - EARLY:
            yield shown
            made += 1
        if made == count:
            return
        shown = frame
    while shown is not None and made < count:
        yield shown
        made += 1


def _fitted(frame: Any, footage: Footage, height: int, width: int) -> Array:
    picture: Image.Image = frame.to_image()
    squared = (footage.size[1], footage.size[0])
    if picture.size != squared:  # pixels that are not square, or a stream that changes its size
        picture = picture.resize(squared, Image.Resampling.BICUBIC)
    if frame.rotation:
        picture = picture.rotate(frame.rotation, expand=True)
    return np.asarray(fitted(picture, height, width))
