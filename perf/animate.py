"""Makes an animated picture (WebP or GIF) from a video file, for the README.

`live-avatar demo` writes the video; `python -m perf.animate --video out/demo.mp4 --output docs/avatar.webp` makes the
picture, without sound.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import click
from PIL import Image

from live_avatar.errors import InputError, LiveAvatarError

FPS = 12.5
SIZE = 240
QUALITY = 80
MAX_BYTES = 1_000_000
FORMATS = {".webp": "WEBP", ".gif": "GIF"}


def sampled_frames(video: Path, fps: float, size: int) -> Iterator[Image.Image]:
    """Frames of a video at `fps` frames a second, scaled to a width of `size` pixels.

    Raises `InputError` if the file is no video, or if the video has fewer frames a second than `fps`.
    """
    try:
        with av.open(str(video)) as container:
            if not container.streams.video:
                raise InputError(f"{video} has no video; give a video file with --video.")
            rate = float(container.streams.video[0].average_rate or 0)
            if rate < fps:
                raise InputError(
                    f"{video} has {rate:g} frames a second, fewer than {fps:g}; give --fps {rate:g} or less."
                )
            taken = 0
            for index, frame in enumerate(container.decode(video=0)):
                if index * fps >= taken * rate:
                    taken += 1
                    height = round(size * frame.height / frame.width)
                    yield Image.fromarray(frame.to_ndarray(format="rgb24")).resize(
                        (size, height), Image.Resampling.LANCZOS
                    )
    except FileNotFoundError as error:
        raise InputError(f"{video} does not exist; run live-avatar demo first, or give another --video.") from error
    except (av.FFmpegError, OSError) as error:
        raise InputError(
            f"cannot read {video} as a video ({error.strerror}); give a video file with --video."
        ) from error


def write_animation(frames: list[Image.Image], output: Path, fps: float) -> None:
    """Writes frames as an animation that repeats forever. Raises `InputError` if it cannot be written."""
    name = FORMATS.get(output.suffix.lower())
    if name is None:
        raise InputError(f"{output} ends in {output.suffix!r}, expected one of {', '.join(FORMATS)}; rename --output.")
    if not frames:
        raise InputError("the video has no frames, expected at least one; give another --video.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        frames[0].save(
            output, name, save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0, quality=QUALITY
        )
    except OSError as error:
        raise InputError(f"cannot write {output} ({error.strerror}); choose another --output.") from error


@click.command()
@click.option("--video", type=click.Path(path_type=Path), default="out/demo.mp4", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="A .webp or .gif file.")
@click.option("--fps", type=click.FloatRange(1, 25), default=FPS, show_default=True)
@click.option("--size", type=click.IntRange(16, 1024), default=SIZE, show_default=True, help="Width in pixels.")
def main(video: Path, output: Path, fps: float, size: int) -> None:
    """Make an animated picture from a video."""
    try:
        write_animation(list(sampled_frames(video, fps, size)), output, fps)
    except LiveAvatarError as error:
        raise click.ClickException(str(error)) from error
    size_bytes = output.stat().st_size
    if size_bytes >= MAX_BYTES:
        output.unlink()
        raise click.ClickException(
            f"the picture has {size_bytes:,} bytes, expected fewer than {MAX_BYTES:,}; lower --size or --fps."
        )
    click.echo(f"{output} ({size_bytes:,} bytes)")


if __name__ == "__main__":
    main()
