"""Evaluates generated videos of real people in the measures of the paper (Tables 2, 4, 6, 7 and 8).

`python -m training.evaluate_videos --generated DIR --reference DIR --weights DIR` compares videos of the same name, in
segments of a stream that begin at 0, 100, 1000 and 10,000 s. Measures whose weights are not there are left empty.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from live_avatar.arrays import Array
from live_avatar.config import FPS, SAMPLES_PER_FRAME
from live_avatar.environment import environment
from live_avatar.errors import ConfigError, InputError
from live_avatar.inputs.image import decode_pixels
from live_avatar.json_files import read_json
from training.checkpoints import write_json
from training.command import FILE, Number, reported
from training.videos.footage import Footage, frames_of, open_footage
from training.videos.measures import loudness, mouth_correlation, small_grey
from training.videos.quality import Moments, colour_drift, frechet, looks_likeness, psnr, ssim
from training.videos.sources import Source, list_sources, picture_beside
from training.videos.syncnet import WINDOW_FRAMES, measure_sync
from training.videos.weights import FVD_FRAMES, SOURCES, MetricWeights, load_weights, squares

STARTS_S = (0, 100, 1000, 10_000)
SECONDS = 10.0
LEAST_FRAMES = max(WINDOW_FRAMES + 1, FVD_FRAMES)
PAPER = ("ASE", "IQA", "Sync-C", "Sync-D", "Dino-S", "FID", "FVD", "FPS", "TTFF")
"""Columns of the paper's tables."""
WEIGHTLESS = ("PSNR", "SSIM", "mouth", "colour", "looks")
"""PSNR and SSIM: to the reference video. mouth: `mouth_correlation` with the video's own speech. colour:
`colour_drift`, looks: `looks_likeness`, both to the reference picture."""
LOWER_IS_BETTER = frozenset({"Sync-D", "FID", "FVD", "TTFF", "colour"})
GIVEN = ("ASE", "IQA", "FPS", "TTFF")
"""Columns that no measure here fills; a file may give them."""

Row = dict[str, float | None]


@dataclass(frozen=True)
class Pair:
    """A generated video, the true one of the same name and its picture uint8 [H, W, 3], in the size of the former."""

    name: str
    generated: Footage
    reference: Footage
    picture: Array

    @property
    def size(self) -> tuple[int, int]:
        return self.generated.size


def open_pairs(generated: Path, reference: Path) -> list[Pair]:
    """Pairs by name without ending. Raises `InputError` if a generated video has no true one."""
    true = {Path(source.name).with_suffix("").as_posix(): source for source in list_sources(reference, 0)}
    pairs = []
    for source in list_sources(generated, 0):
        name = Path(source.name).with_suffix("").as_posix()
        if name not in true:
            raise InputError(f"{source.path} has no video of the same name in {reference}; add it, or leave it out.")
        footage, other = open_footage(source.path), open_footage(true[name].path)
        pairs.append(Pair(name, footage, other, _picture(true[name], other, footage.size)))
    return pairs


def _picture(source: Source, footage: Footage, size: tuple[int, int]) -> Array:
    """The picture beside the true video, or else its first frame."""
    beside = picture_beside(source)
    if beside is not None:
        return np.asarray(decode_pixels(beside.read_bytes(), *size))
    frame = next(frames_of(footage, *size), None)
    if frame is None:
        raise InputError(f"{footage.path} has 0 frames with sound; give a longer video.")
    return frame


def segment(footage: Footage, size: tuple[int, int], start: int, frames: int) -> tuple[Array, Array] | None:
    """Frames uint8 [n, H, W, 3] and speech of a part of a video; None if it is not there.

    The first part may be shorter; it needs `LEAST_FRAMES`.
    """
    stop = min(start + frames, footage.frames)
    if stop - start < (frames if start else LEAST_FRAMES):
        return None
    speech = footage.speech[start * SAMPLES_PER_FRAME : stop * SAMPLES_PER_FRAME]
    return np.stack(list(frames_of(footage, *size, start, stop))), speech


def measure_segment(pair: Pair, start: int, frames: int, weights: MetricWeights) -> tuple[Row, Array] | None:
    """Figures of one part of a generated video, and its frames; None if it ends before."""
    part = segment(pair.generated, pair.size, start, frames)
    if part is None:
        return None
    shown, speech = part
    grey = np.stack([small_grey(frame) for frame in shown])
    row: Row = {
        "mouth": mouth_correlation(grey, loudness(speech)),
        "colour": colour_drift(shown, pair.picture),
        "looks": looks_likeness(grey, small_grey(pair.picture)),
    }
    true = segment(pair.reference, pair.size, start, frames)
    if true is not None:
        count = min(len(shown), len(true[0]))
        row |= {"PSNR": psnr(shown[:count], true[0][:count]), "SSIM": ssim(shown[:count], true[0][:count])}
    if weights.syncnet is not None:
        sync = measure_sync(weights.syncnet, squares(shown), speech)
        row |= {"Sync-C": sync.confidence, "Sync-D": sync.distance}
    if weights.dino is not None:
        features, expected = weights.dino_features(shown), weights.dino_features(pair.picture[None])
        row["Dino-S"] = float((features @ expected[0]).mean())
    return row, shown


@dataclass
class Sets:
    """Features of sets of frames, for the distances of sets."""

    frames: Moments
    runs: Moments

    @classmethod
    def empty(cls) -> Sets:
        return cls(Moments(), Moments())

    def add(self, frames: Array, weights: MetricWeights) -> None:
        if weights.inception is not None:
            self.frames.add(weights.inception_features(frames))
        if weights.i3d is not None:
            self.runs.add(weights.i3d_features(frames))

    def distances(self, expected: Sets) -> Row:
        """FID and FVD; None where a set has fewer than two features, which have no covariance."""
        row: Row = {}
        for name, ours, theirs in (("FID", self.frames, expected.frames), ("FVD", self.runs, expected.runs)):
            enough = min(ours.count, theirs.count) >= 2
            row[name] = frechet(ours, theirs) if enough else None
        return row


def evaluate(
    pairs: Sequence[Pair], weights: MetricWeights, starts_s: Sequence[int] = STARTS_S, seconds: float = SECONDS
) -> dict[str, Any]:
    """Figures of every segment that some video has: means over videos, each video's, and distances of the sets.

    The sets of FID and FVD are those of the segment and the first segments of all true videos.
    """
    frames = round(seconds * FPS)
    truth = Sets.empty()
    for pair in pairs:
        true = segment(pair.reference, pair.size, 0, frames)
        if true is not None:
            truth.add(true[0], weights)
    segments = []
    for start_s in starts_s:
        made, rows = Sets.empty(), {}
        for pair in tqdm(pairs, desc=f"from {start_s} s", unit="videos", disable=None):
            found = measure_segment(pair, start_s * FPS, frames, weights)
            if found is not None:
                rows[pair.name], shown = found
                made.add(shown, weights)
        if rows:
            means = {name: _mean([row.get(name) for row in rows.values()]) for name in (*PAPER, *WEIGHTLESS)}
            means |= made.distances(truth)
            segments.append({"start_s": start_s, "videos": len(rows), "mean": means, "each": rows})
    if not segments:
        raise InputError(
            f"no generated video has {LEAST_FRAMES} frames with sound; give longer ones, or an earlier --starts."
        )
    return {"seconds": seconds, "segments": segments}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def read_given(path: Path) -> dict[str, float]:
    """Columns that were measured elsewhere, from a JSON object. Raises `InputError` for others."""
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); give an object of figures.") from error
    numbers = isinstance(values, dict) and all(type(value) in (int, float) for value in values.values())
    if not numbers or not values.keys() <= set(GIVEN):
        raise InputError(f"{path} holds {values!r}; expected an object of numbers with keys of {', '.join(GIVEN)}.")
    return {name: float(value) for name, value in values.items()}


def table(found: Mapping[str, Any], given: Mapping[str, float]) -> str:
    """The report as a table in Markdown, in the paper's columns; a dash is what was not measured."""
    columns = (*PAPER, *WEIGHTLESS)
    heads = [f"{name} {'↓' if name in LOWER_IS_BETTER else '↑'}" for name in columns]
    lines = [f"| segment | videos | {' | '.join(heads)} |", "|" + "---|" * (len(heads) + 2)]
    for one in found["segments"]:
        values = {**one["mean"], **given}
        cells = ["-" if values.get(name) is None else f"{values[name]:.3f}" for name in columns]
        span = f"{one['start_s']}-{one['start_s'] + found['seconds']:g} s"
        lines.append(f"| {span} | {one['videos']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _starts(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        starts = tuple(int(word) for word in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is no list of whole seconds, such as 0,100") from error
    if min(starts) < 0:
        raise click.BadParameter(f"{value!r} has a time below 0; give times from the start, such as 0,100")
    return starts


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--generated", type=FILE, required=True, help="Folder of generated videos with their speech.")
@click.option("--reference", type=FILE, required=True, help="Folder of true videos of the same names; the reference "
              "picture is NAME.png beside NAME.mp4, or its first frame.")  # fmt: skip
@click.option("--weights", type=FILE, help=f"Folder with {', '.join(SOURCES)}, as far as there.")
@click.option("--figures", type=FILE, help=f"JSON object of columns measured elsewhere: {', '.join(GIVEN)}.")
@click.option("--starts", callback=_starts, default=",".join(map(str, STARTS_S)), show_default=True,
              help="Where segments begin, in seconds.")  # fmt: skip
@click.option("--seconds", type=Number(1), default=SECONDS, show_default=True, help="Length of a segment.")
@click.option("--report", type=FILE, help="Write all figures to this JSON file.")
def main(
    generated: Path,
    reference: Path,
    weights: Path | None,
    figures: Path | None,
    starts: tuple[int, ...],
    seconds: float,
    report: Path | None,
) -> None:
    """Measure generated videos against true ones."""
    with reported():
        if generated.resolve() == reference.resolve():
            raise ConfigError(f"--generated and --reference are both {generated}; give two folders.")
        networks = load_weights(weights)
        given = read_given(figures) if figures is not None else {}
        found = evaluate(open_pairs(generated, reference), networks, starts, seconds)
        click.echo(table(found, given))
        for name in networks.missing:
            click.echo(f"Not measured: {name} is not in --weights. It comes from: {SOURCES[name]}.", err=True)
        if report is not None:
            whole = {**found, "given": given, "missing": list(networks.missing), "environment": environment("torch")}
            write_json(report, json.loads(json.dumps(whole)))


if __name__ == "__main__":
    main()
