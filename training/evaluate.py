"""Evaluates a trained avatar on new voices and faces: whether the mouth follows the voice, and the face stays the same.

`python -m training.evaluate --artifacts artifacts/tiny` generates test clips with the exported graphs, which are also
served.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image
from tqdm import tqdm

from live_avatar.arrays import Array
from live_avatar.config import FPS
from live_avatar.environment import environment
from live_avatar.errors import ConfigError
from live_avatar.graphs.artifacts import load_artifacts
from live_avatar.pipeline.generator import Generator
from live_avatar.runtime.onnx_runtime import OnnxRuntime
from training.checkpoints import write_json, write_whole
from training.command import FILE, reported
from training.data.clips import Clip, Split, make_clip, make_utterance
from training.mouth import best_lag, correlation, looks_distance, measure_mouth

LAGS = range(-6, 7)
LONG_WINDOWS_S = ((0, 10), (100, 110), (1000, 1010))
"""Parts of a long stream for the measure of the looks, as in the paper's Table 7."""
SHEET_ROWS, SHEET_FRAMES, SHEET_STEP = 4, 12, 3
UTTERANCE_BLOCKS = 20

Generate = Callable[[Clip, int], Array]
"""From a clip's picture, prompt and speech, and a seed, to frames uint8 [n, H, W, 3]."""


@dataclass(frozen=True)
class GeneratedClip:
    """A test clip, and the frames generated from its picture, prompt and speech."""

    clip: Clip
    frames: Array


def png(picture: Array) -> bytes:
    """A picture uint8 [H, W, 3] as a client sends it."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def by(generator: Generator) -> Generate:
    """Generation with a `Generator`."""

    def generate(clip: Clip, seed: int) -> Array:
        blocks = generator.generate(png(clip.picture), clip.prompt, seed, clip.speech)
        return np.concatenate([block.frames for block in blocks])

    return generate


def spoken_clips(count: int, blocks: int, size: int) -> list[Clip]:
    """`count` clips of the test split with speech, size x size pixels."""
    drawn = (make_clip(Split.TEST, seed, blocks, size) for seed in itertools.count())
    return list(itertools.islice((clip for clip in drawn if clip.mouth[:, 0].std() > 0), count))


def lip_sync(takes: Sequence[GeneratedClip]) -> dict[str, Any]:
    """Correlation of the measured mouth opening with the true one: mean, standard deviation over clips, and each.

    shuffled: of each clip's frames with the truth of the next clip, which has other speech. chance: of both truths.
    ruler: of the measure on the true frames themselves, which is the best possible value.
    """
    measured = [_opening(take.frames, take.clip) for take in takes]
    rendered = [_opening(take.clip.frames, take.clip) for take in takes]
    truth = [take.clip.mouth[:, 0] for take in takes]
    following = truth[1:] + truth[:1]
    lags = [best_lag(seen, true, LAGS) for seen, true in zip(measured, truth, strict=True)]
    widths = [measure_mouth(take.frames, take.clip.picture)[:, 1] for take in takes]
    return {
        "opening": spread([correlation(*pair) for pair in zip(measured, truth, strict=True)]),
        "width": spread([correlation(w, take.clip.mouth[:, 1]) for w, take in zip(widths, takes, strict=True)]),
        "shuffled": spread([correlation(*pair) for pair in zip(measured, following, strict=True)]),
        "chance": spread([correlation(*pair) for pair in zip(truth, following, strict=True)]),
        "ruler": spread([correlation(*pair) for pair in zip(rendered, truth, strict=True)]),
        "best_lag_frames": {"median": float(np.median(lags)), "each": lags},
    }


def looks(takes: Sequence[GeneratedClip]) -> dict[str, Any]:
    """Distance of the looks from the picture in levels of 255, generated and true."""
    return {
        "generated": spread([float(looks_distance(take.frames, take.clip.picture).mean()) for take in takes]),
        "truth": spread([float(looks_distance(take.clip.frames, take.clip.picture).mean()) for take in takes]),
    }


def long_stream(
    generator: Generator, clip: Clip, seed: int, windows: Sequence[tuple[int, int]]
) -> list[dict[str, Any]]:
    """Looks in parts of one long stream with speech of many voices: mean distance, and its spread over seconds."""
    ends = [[int(side * FPS) for side in window] for window in windows]
    kept: list[list[Array]] = [[] for _ in windows]
    at = 0
    with tqdm(total=ends[-1][1], unit="frames", desc="long stream") as bar:
        for block in generator.stream(png(clip.picture), clip.prompt, seed, _endless(generator, seed)):
            for index, (start, stop) in enumerate(ends):
                part = block.frames[max(0, start - at) : max(0, stop - at)]
                if len(part):
                    kept[index].append(part)
            at += len(block.frames)
            bar.update(len(block.frames))
            if at >= ends[-1][1]:
                break
    return [_window(window, np.concatenate(frames), clip) for window, frames in zip(windows, kept, strict=True)]


def _window(window: tuple[int, int], frames: Array, clip: Clip) -> dict[str, Any]:
    distance = looks_distance(frames, clip.picture)
    seconds = distance[: len(distance) // FPS * FPS].reshape(-1, FPS).mean(1)
    return {"seconds": list(window), "mean": float(seconds.mean()), "sd": float(seconds.std(ddof=1))}


def _endless(generator: Generator, seed: int) -> Iterator[Array]:
    """Blocks of test speech, one utterance after another."""
    size = generator.preset.stream.block_samples
    while True:
        utterance = make_utterance(Split.TEST, seed, UTTERANCE_BLOCKS)
        yield from utterance.speech.reshape(-1, size)
        seed += 1


def _opening(frames: Array, clip: Clip) -> Array:
    opening: Array = measure_mouth(frames, clip.picture)[:, 0]
    return opening


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation of a sample, and the values."""
    return {
        "mean": round(float(np.mean(values)), 4),
        "sd": round(float(np.std(values, ddof=1)), 4) if len(values) > 1 else 0.0,
        "each": [round(value, 4) for value in values],
    }


def contact_sheet(takes: Sequence[GeneratedClip]) -> Image.Image:
    """Rows of true and generated frames in turn, of the same times in the middle of each clip."""
    rows = [
        np.concatenate(list(_moments(frames)), axis=1) for take in takes for frames in (take.clip.frames, take.frames)
    ]
    return Image.fromarray(np.concatenate(rows))


def _moments(frames: Array) -> Array:
    step = min(SHEET_STEP, len(frames) // SHEET_FRAMES)
    start = (len(frames) - step * SHEET_FRAMES) // 2
    return frames[start : start + step * SHEET_FRAMES : step]


def evaluate(generator: Generator, count: int, blocks: int, streams: int) -> tuple[dict[str, Any], list[GeneratedClip]]:
    """All figures of an avatar, and their takes."""
    clips, generate = spoken_clips(count, blocks, generator.preset.stream.height), by(generator)
    takes = [
        GeneratedClip(clip, generate(clip, seed))
        for seed, clip in enumerate(tqdm(clips, unit="clips", desc="test clips"))
    ]
    figures = {
        "clips": len(takes),
        "seconds_each": blocks * generator.preset.stream.block_frames / FPS,
        "lip_sync": lip_sync(takes),
        "looks": looks(takes),
        "long_streams": [long_stream(generator, clips[seed], seed, LONG_WINDOWS_S) for seed in range(streams)],
        "environment": environment("onnxruntime", "numpy"),
    }
    return figures, takes


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--artifacts", type=FILE, default=Path("artifacts/tiny"), show_default=True, help="Folder of an exported avatar."
)
@click.option("--clips", "count", type=click.IntRange(2), default=16, show_default=True, help="Number of test clips.")
@click.option(
    "--blocks", type=click.IntRange(2), default=20, show_default=True, help="Number of blocks (0.48 s) of each clip."
)
@click.option("--streams", type=click.IntRange(0), default=3, show_default=True, help="Number of streams of 1010 s.")
@click.option("--report", type=FILE, help="Write the figures to this JSON file.")
@click.option("--sheet", type=FILE, help="Write a contact sheet of true and generated frames to this PNG file.")
def main(artifacts: Path, count: int, blocks: int, streams: int, report: Path | None, sheet: Path | None) -> None:
    """Measure an exported avatar on voices and faces of the test split."""
    with reported():
        generator = Generator(OnnxRuntime(load_artifacts(artifacts)))
        if streams > count:
            raise ConfigError(
                f"{streams} long streams need as many faces, but there are {count} clips; give more --clips."
            )
        figures, takes = evaluate(generator, count, blocks, streams)
        click.echo(json.dumps(figures, indent=1))
        if report is not None:
            write_json(report, figures)
        if sheet is not None:
            picture = contact_sheet(takes[:SHEET_ROWS])
            write_whole(sheet, lambda place: picture.save(place, "PNG"))


if __name__ == "__main__":
    main()
