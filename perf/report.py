"""Shows figures: as a table of text, as pictures, and as the README's measured table.

`python -m perf.report` writes the table between the README's marks from the JSON files of `perf/results/`;
with --check it only says whether the README has it. Knows how figures are named; measures nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from live_avatar.errors import InputError
from perf.figures import StageTimes

mpl.use("Agg")

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- measured: made by `python -m perf.report` -->", "<!-- /measured -->"
BLUE, GREEN, RED, GREY = "#3b6fd4", "#0f857a", "#c4513a", "#8a94a3"
COLOURS = 32
"""Of a picture's palette: plots need few, and stay small."""


def table(figures: Mapping[str, Any]) -> str:
    """Every number by its place, such as `throughput.fps`, one in a line."""
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
    """Each stage's share of the time at work, with its milliseconds for a block."""
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
    if len(series) > 1:
        plot.legend(frameon=False)
    save(plot, path)
