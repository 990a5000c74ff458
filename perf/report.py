"""Shows figures as text, as pictures, and as the tables of README.md and docs/measurements.md.

`python -m perf.report` writes each table between its markers from the JSON files of `perf/results/`; with --check it
only checks that the documents have them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from live_avatar.errors import InputError
from perf.figures import StageTimes

mpl.use("Agg")

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
BLUE, GREEN, RED, GREY = "#3b6fd4", "#0f857a", "#c4513a", "#8a94a3"
CLIENT = "this process"
"""The name of the measuring process in `perf.growth`; it holds frames that were not read yet."""
COLUMN = 6
"""A legend with more lines than this is placed beside the plot."""
COLOURS = 32
"""Colors in a picture's palette; few, so that the files stay small."""


def table(figures: Mapping[str, Any]) -> str:
    """Every number by its path, such as `throughput.fps`, one in a line."""
    rows = list(_rows(figures, ""))
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def _rows(value: Any, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, below in value.items():
            yield from _rows(below, f"{place}.{name}" if place else str(name))
    elif isinstance(value, list) and any(isinstance(one, Mapping | list) for one in value):
        for number, below in enumerate(value):
            yield from _rows(below, f"{place}[{number}]")
    elif isinstance(value, list) and len(value) > 8:
        yield place, f"{len(value)} values, {value[0]} ... {value[-1]}"
    else:
        yield place, f"{value:g}" if isinstance(value, float) else str(value)


# ---- Pictures


def axes(title: str, x: str, y: str, height: float = 3.2) -> Axes:
    """An empty plot in the project's look."""
    figure = Figure(figsize=(7.2, height), dpi=110, layout="constrained")
    plot = figure.subplots()
    plot.set(title=title, xlabel=x, ylabel=y)
    plot.spines[["top", "right"]].set_visible(False)
    plot.grid(alpha=0.25)
    plot.set_axisbelow(True)
    return plot


def save(plot: Axes, path: Path) -> None:
    """Writes a plot as a small PNG. Raises `InputError` if it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        plot.get_figure(root=True).savefig(path)  # type: ignore[union-attr]
        with Image.open(path) as picture:
            small = picture.convert("RGB").quantize(COLOURS)
        small.save(path, "PNG", optimize=True)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); choose another --out.") from error


def busy_picture(stages: Mapping[str, StageTimes], path: Path) -> None:
    """Share of the time in which each stage is busy, with its milliseconds per block."""
    plot = axes("Stages at work, one session as fast as it goes", "share of the time", "")
    names = list(stages)[::-1]
    shares = [stages[name].busy_share for name in names]
    bars = plot.barh(names, shares, color=BLUE)
    plot.bar_label(bars, [f"{stages[name].mean_s * 1e3:.1f} ms a block" for name in names], padding=4)
    plot.set_xlim(0, 1.25)
    save(plot, path)


def lines_picture(
    path: Path, title: str, x: str, y: str, series: Mapping[str, tuple[Sequence[float], Sequence[float]]]
) -> None:
    """Lines by name, each of xs and ys."""
    plot = axes(title, x, y)
    for (name, (xs, ys)), colour in zip(series.items(), (BLUE, GREEN, RED, GREY) * 4, strict=False):
        plot.plot(xs, ys, label=name, color=colour, marker="o" if len(xs) < 40 else None, markersize=3.5)
    plot.set_ylim(bottom=0)
    if len(series) > COLUMN:
        plot.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    elif len(series) > 1:
        plot.legend(frameon=False)
    save(plot, path)


# ---- The tables of the documents


@dataclass(frozen=True)
class Row:
    """One line of a table: subject, scenario, and the text of its figures; in_readme: also in the README's table."""

    what: str
    scenario: str
    say: Callable[[Any], str]
    in_readme: bool = False


@dataclass(frozen=True)
class Document:
    """A document with a table: its path from `root`, the name in its markers, whether it has all rows."""

    path: str
    name: str
    complete: bool

    @property
    def begin(self) -> str:
        return f"<!-- {self.name}: made by `python -m perf.report` -->"

    @property
    def end(self) -> str:
        return f"<!-- /{self.name} -->"


DOCUMENTS = (
    Document("README.md", "figures", complete=False),
    Document("docs/measurements.md", "measured", complete=True),
)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _latency(one: Any) -> str:
    return f"{_ms(one['p50_s'])} / {_ms(one['p95_s'])} / {_ms(one['p99_s'])}"


def _playback(one: Any) -> str:
    return f"{one['stalls']}, longest gap {_ms(one['longest_gap_s'])}"


def _start(one: Any) -> str:
    return f"{_ms(one['ttff_s'])}: {_ms(one['block_wait_s'])} + {_ms(one['denoising_s'])} + {_ms(one['decoding_s'])}"


def _first_frames(figures: Any) -> str:
    found = figures["first_frames_of_speech_at_hand"]
    return ", ".join(_ms(found[kind]["ttff_median_s"]) for kind in ("known", "new"))


def _fps(figures: Any) -> str:
    return f"{figures['throughput']['fps']:.1f}"


def _efficiency(figures: Any) -> str:
    return f"{figures['frames_96x96']['efficiency']:.3f}"


def _spoken(figures: Any) -> str:
    return _start(figures["spoken"]["known"])


def _passing(one: Any) -> str:
    return f"{one['hop_s'] * 1e3:.1f} ms a hop, {one['out_s'] * 1e3:.1f} ms for the frames to the client"


def _early_and_late(one: Any) -> str:
    return f"{one['early']['fps']:.1f}, {one['late']['fps']:.1f}"


def _growth(one: Any) -> str:
    memory = [process for process in one["memory_mib_by_hour_of_video"] if process["name"] != CLIENT]
    most = max(memory, key=lambda process: float(process["last_mib"]) - float(process["first_mib"]))
    grown = f"{most['name']} grew most, {most['first_mib']:.1f} to {most['last_mib']:.1f} MiB"
    return f"{grown}, over {one['video_s']:,.0f} s of video"


ROWS = (
    Row(
        "FPS, one session as fast as it goes (playback is 25)",
        "single",
        lambda f: f"{f['throughput']['fps']:.1f}",
        True,
    ),
    Row("FPS of `live-avatar generate`, in the same run", "single", lambda f: f"{f['generate_fps']:.1f}"),
    Row("Latency in real time, p50 / p95 / p99", "realtime", lambda f: _latency(f["chunks_of_20_ms"]["latency"]), True),
    Row("Stalls of playback, of 100 blocks", "realtime", lambda f: _playback(f["chunks_of_20_ms"]["playback"])),
    Row(
        "TTFF as one speaks, known avatar: wait, denoising, decoding",
        "start",
        lambda f: _start(f["spoken"]["known"]),
        True,
    ),
    Row("TTFF, speech at hand, known avatar", "start", lambda f: _ms(f["speech_at_hand"]["known"]["ttff_s"])),
    Row("TTFF, speech at hand, new avatar", "start", lambda f: _ms(f["speech_at_hand"]["new"]["ttff_s"])),
    Row("First frames of speech at hand, known and new avatar", "start", _first_frames),
    Row("Real-time sessions at once without a stall", "sessions", lambda f: str(f["real_time_sessions"]), True),
    Row("Memory of one more session", "sessions", lambda f: f"{f['memory_per_session_mib']:.0f} MiB"),
    Row(
        "Pipeline efficiency (each stage padded to 0.3 s)",
        "pipeline",
        lambda f: f"{f['frames_96x96']['efficiency']:.3f}",
    ),
    Row("Serving overhead per block, 96x96", "pipeline", lambda f: _passing(f["frames_96x96"]["passing"])),
    Row("Serving overhead per block, 720x400", "pipeline", lambda f: _passing(f["frames_720x400"]["passing"])),
    Row("FPS of one long session, early and late", "long", _early_and_late),
    Row("Memory of the server's processes in that session", "long", _growth),
)


def measured(results: Path, document: Document) -> str:
    """The document's table, from the scenarios that have a JSON file in `results`."""
    to_root = "../" * document.path.count("/")
    lines = ["| | | |", "|---|---|---|"]
    for row in ROWS:
        path = results / f"{row.scenario}.json"
        if path.exists() and (document.complete or row.in_readme):
            said = row.say(json.loads(path.read_text())["figures"])
            lines.append(f"| {row.what} | {said} | [JSON]({to_root}perf/results/{path.name}) |")
    return "\n".join(lines)


def with_table(text: str, made: str, document: Document) -> str:
    """The text with the table between its markers. Raises `InputError` unless it has each marker once."""
    begin, end = document.begin, document.end
    if text.count(begin) != 1 or text.count(end) != 1:
        raise InputError(
            f"{document.path} must have the lines {begin} and {end} once each; put them where the table goes."
        )
    before, rest = text.split(begin)
    return f"{before}{begin}\n{made}\n{end}{rest.split(end)[1]}"


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; exit code 1 if a table is out of date.")
def main(check: bool) -> None:
    """Write the tables of README.md and docs/measurements.md from perf/results/."""
    for document in DOCUMENTS:
        path = ROOT / document.path
        text = path.read_text()
        try:
            wanted = with_table(text, measured(RESULTS, document), document)
        except InputError as error:
            raise click.ClickException(str(error)) from error
        if check and wanted != text:
            raise click.ClickException(
                f"{document.path} has another table than perf/results/ makes; run python -m perf.report."
            )
        if not check:
            path.write_text(wanted)


if __name__ == "__main__":
    main()
