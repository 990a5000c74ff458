"""Videos for the tests of training on real video: written with PyAV, of any rate, turn and number of sound tracks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from live_avatar.arrays import Array

TICKS = 1000  # per second


def grey_frames(levels: Sequence[int], height: int = 64, width: int = 96) -> Array:
    """Frames of one level of grey each, uint8 [n, height, width, 3]."""
    return np.repeat(np.array(levels, np.uint8)[:, None, None, None], height, 1).repeat(width, 2).repeat(3, 3)


def tone(seconds: float, hertz: float = 220.0, rate: int = 16_000) -> Array:
    """A sine, int16 [n]."""
    times = np.arange(round(seconds * rate)) / rate
    return (8000 * np.sin(2 * np.pi * hertz * times)).astype(np.int16)


def write_video(
    path: Path,
    frames: Array,
    times_ms: Sequence[int] | None = None,
    tracks: Mapping[str, Array] | None = None,
    rotation: int = 0,
    sound_at_ms: int = 0,
    options: Mapping[str, str] | None = None,
) -> Path:
    """Writes H.264. times_ms: of each frame, 25 fps without. tracks: sound by language, lossless in MKV, AAC in MP4."""
    lossless = path.suffix == ".mkv"
    with av.open(str(path), "w") as file:
        video = file.add_stream("libx264", rate=25, options={"crf": "1", **(options or {})})
        video.height, video.width, video.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        video.time_base = video.codec_context.time_base = Fraction(1, TICKS)
        if rotation:
            video.set_display_rotation(rotation)
        sounds = [(file.add_stream("pcm_s16le" if lossless else "aac", rate=16_000, layout="mono"), language, samples)
                  for language, samples in (tracks or {}).items()]  # fmt: skip
        for stream, language, _ in sounds:
            stream.metadata["language"] = language
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts = 40 * index if times_ms is None else times_ms[index]
            picture.time_base = Fraction(1, TICKS)
            file.mux(video.encode(picture))
        file.mux(video.encode(None))
        for stream, _, samples in sounds:
            sound = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
            sound.sample_rate, sound.pts, sound.time_base = 16_000, sound_at_ms * 16, Fraction(1, 16_000)
            file.mux(stream.encode(sound))
            file.mux(stream.encode(None))
    return path
