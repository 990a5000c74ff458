"""Renders drawn clips to MP4 files, to try `training.prepare` on videos whose content is known.

`python -m training.films --output out/films --clips 24` writes NAME.mp4, NAME.png (the face at rest) and captions.json.
"""

from __future__ import annotations

from pathlib import Path

import click
from PIL import Image
from tqdm import tqdm

from live_avatar.config import TINY
from live_avatar_client.media import Mp4Writer
from training.checkpoints import write_json
from training.command import FILE, reported
from training.data.clips import Clip, Split, make_clip

CAPTIONS = "captions.json"


def write_film(path: Path, clip: Clip) -> None:
    """Writes a clip as H.264 with AAC, and its picture beside it."""
    height, width = clip.frames.shape[1:3]
    with Mp4Writer(path, width, height, speech=clip.speech) as file:
        file.write(clip.frames)
    Image.fromarray(clip.picture).save(path.with_suffix(".png"))


def write_films(folder: Path, split: Split, count: int, blocks: int, size: int) -> None:
    """The first `count` clips of a split, `blocks` blocks long and `size` x `size` pixels, with their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = {}
    for seed in tqdm(range(count), desc="films", unit="clips", disable=None):
        clip, name = make_clip(split, seed, blocks, size), f"{split.name.lower()}-{seed:04d}.mp4"
        write_film(folder / name, clip)
        captions[name] = clip.prompt
    write_json(folder / CAPTIONS, captions)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--output", type=FILE, required=True, help="Folder for the files.")
@click.option("--clips", "count", type=click.IntRange(1), default=24, show_default=True, help="Number of clips.")
@click.option("--blocks", type=click.IntRange(1), default=24, show_default=True, help="Length of each, in 0.48 s.")
@click.option("--size", type=click.IntRange(64), default=TINY.stream.height, show_default=True, help="Pixels a side.")
def main(output: Path, count: int, blocks: int, size: int) -> None:
    """Render drawn faces that talk to MP4 files."""
    with reported():
        write_films(output, Split.TRAIN, count, blocks, size)
        click.echo(f"Wrote {count} films and {output / CAPTIONS}.")


if __name__ == "__main__":
    main()
