"""Draws a trace: when each stage worked on each block, after Figure 8 of the paper.

`python -m perf.timeline TRACE_FOLDER --output docs/timeline.png`; `live-avatar serve --trace` writes the folder. It
draws the session that began last, which has a warm server if another session ran before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import click
from PIL import Image, ImageDraw, ImageFont

from live_avatar.errors import InputError, LiveAvatarError
from live_avatar.serving.trace import Interval, read_trace

# Sizes in pixels. The picture is drawn SCALE times as large and then reduced, for smooth edges.
SCALE = 2
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 1200, 136, 28, 58, 58
ROW, BAR, RADIUS = 46, 32, 5
TICKS_AT_MOST = 14
TICK_STEPS_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)

PAPER, WARM_UP, BUBBLE, GRID, MUTED, INK = "#fbfcfe", "#f1f4f9", "#fbeee0", "#dde3ec", "#5b6675", "#1c2530"
BLOCKS = ("#3b6fd4", "#0f857a", "#4a8428", "#a86a12", "#c4513a", "#7d4fc0")  # as in docs/pipeline.svg


@dataclass(frozen=True)
class Timeline:
    """One session's intervals, in seconds since its first; stages in the order in which they got its first block."""

    stages: tuple[str, ...]
    intervals: tuple[Interval, ...]

    @property
    def end_s(self) -> float:
        return max(i.end_s for i in self.intervals)

    @property
    def delivered_s(self) -> list[float]:
        """When the last stage had finished each block."""
        return sorted(i.end_s for i in self.intervals if i.stage == self.stages[-1])

    @property
    def period_s(self) -> float | None:
        """Median time from one finished block to the next; None for a single block."""
        gaps = [later - earlier for earlier, later in pairwise(self.delivered_s)]
        return median(gaps) if gaps else None


def sink_bubble(timeline: Timeline, update_block: int | None) -> tuple[float, float] | None:
    """Start and end of the time in which the first step is idle because block `update_block` (from 1) waits for the new
    sink; None if the session ends earlier or the sink is never replaced."""
    first_step = timeline.stages[1] if len(timeline.stages) > 1 else None
    worked = {i.block: i for i in timeline.intervals if i.stage == first_step}
    before, after = ((update_block or 0) - 2, (update_block or 0) - 1)
    if before not in worked or after not in worked:
        return None
    return worked[before].end_s, worked[after].start_s


def last_session(intervals: Iterable[Interval]) -> Timeline:
    """The session that began last. Raises `InputError` if there is none."""
    by_start = sorted(intervals, key=lambda i: i.start_s)
    began = {i.session: i.start_s for i in reversed(by_start)}
    if not began:
        raise InputError("the trace holds no intervals; stream something to a server that was started with --trace.")
    session = max(began, key=lambda key: began[key])
    zero = began[session]
    kept = tuple(
        Interval(i.stage, i.session, i.block, i.start_s - zero, i.end_s - zero)
        for i in by_start
        if i.session == session
    )
    return Timeline(tuple(dict.fromkeys(i.stage for i in sorted(kept, key=lambda i: (i.block, i.start_s)))), kept)


def draw(timeline: Timeline, bubble: tuple[float, float] | None = None) -> Image.Image:
    """Draws a row per stage and a bar per block with its number from 1. The time until the first frames is shaded, and
    the time of the sink's update if it is given."""
    bottom = TOP + ROW * len(timeline.stages)
    canvas = _Canvas(bottom + BOTTOM, timeline.end_s)
    first_s = timeline.delivered_s[0]
    edge = canvas.x(first_s)
    canvas.box(LEFT, TOP, edge, bottom, WARM_UP)
    if bubble is not None:
        begin, end = map(canvas.x, bubble)
        canvas.box(begin, TOP, end, bottom, BUBBLE)
        canvas.text((begin + end) / 2, TOP - 44, f"AAS: {bubble[1] - bubble[0]:.2f} s until the new sink", 15, INK)
    for at in _ticks(timeline.end_s):
        canvas.line(canvas.x(at), TOP, canvas.x(at), bottom, GRID)
        canvas.text(canvas.x(at), bottom + 14, f"{at:g}", 14, MUTED)
    canvas.line(edge, TOP - 32, edge, bottom, MUTED)
    canvas.text((LEFT + WIDTH - RIGHT) / 2, bottom + 38, "seconds since the first block came in", 14, MUTED)
    for row, stage in enumerate(timeline.stages):
        middle = TOP + ROW * (row + 0.5)
        canvas.text(LEFT - 14, middle, stage, 16, INK, "rm")
        if row:
            canvas.line(LEFT, middle - ROW / 2, WIDTH - RIGHT, middle - ROW / 2, GRID)
        for interval in (i for i in timeline.intervals if i.stage == stage):
            canvas.bar(interval, middle)
    canvas.text(edge - 10, TOP - 22, f"warm-up, first frames after {first_s:.2f} s", 15, INK, "rm")
    if timeline.period_s is not None:
        canvas.text(edge + 10, TOP - 22, f"then a block every {timeline.period_s:.2f} s", 15, INK, "lm")
    return canvas.finished()


class _Canvas:
    """A drawing with coordinates in pixels of the final picture."""

    def __init__(self, height: int, end_s: float) -> None:
        self._image = Image.new("RGB", (WIDTH * SCALE, height * SCALE), PAPER)
        self._draw = ImageDraw.Draw(self._image)
        self._per_second = (WIDTH - LEFT - RIGHT) / end_s

    def x(self, at_s: float) -> float:
        return LEFT + at_s * self._per_second

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: str, radius: float = 0) -> None:
        self._draw.rounded_rectangle(_scaled(x0, y0, x1, y1), radius * SCALE, colour)

    def line(self, x0: float, y0: float, x1: float, y1: float, colour: str) -> None:
        self._draw.line(_scaled(x0, y0, x1, y1), colour, SCALE)

    def text(self, x: float, y: float, text: str, size: int, colour: str, anchor: str = "mm") -> None:
        self._draw.text((x * SCALE, y * SCALE), text, colour, ImageFont.load_default(size * SCALE), anchor)

    def bar(self, interval: Interval, middle: float) -> None:
        """Draws a block's bar; a number that does not fit is drawn to its right."""
        start, end = self.x(interval.start_s) + 0.5, self.x(interval.end_s) - 0.5
        colour, number = BLOCKS[interval.block % len(BLOCKS)], str(interval.block + 1)
        width = max(end - start, 2.0)
        self.box(start, middle - BAR / 2, start + width, middle + BAR / 2, colour, min(RADIUS, width / 2))
        if width > 10 * len(number) + 4:
            self.text(start + width / 2, middle, number, 16, PAPER)
        else:
            self.text(start + width + 4, middle, number, 16, colour, "lm")

    def finished(self) -> Image.Image:
        return self._image.reduce(SCALE)


def _scaled(*values: float) -> list[float]:
    return [value * SCALE for value in values]


def _ticks(end_s: float) -> Sequence[float]:
    step = next((s for s in TICK_STEPS_S if end_s / s < TICKS_AT_MOST), TICK_STEPS_S[-1])
    return [step * n for n in range(int(end_s / step) + 1)]


@click.command()
@click.argument("trace", metavar="TRACE_FOLDER", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Picture to write (PNG).")
def main(trace: Path, output: Path) -> None:
    """Draw when each stage worked on which block."""
    try:
        picture = draw(last_session(_read(trace)))
        write(picture, output)
    except LiveAvatarError as error:
        raise click.ClickException(str(error)) from error


def _read(folder: Path) -> list[Interval]:
    try:
        return read_trace(folder)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder} is not a whole trace ({error}); name a folder from --trace.") from error


def write(picture: Image.Image, output: Path) -> None:
    """Raises `InputError` for a path that cannot be written."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        picture.quantize(64).save(output, "PNG", optimize=True)
    except OSError as error:
        raise InputError(f"cannot write {output} ({error.strerror}); choose another --output.") from error


if __name__ == "__main__":
    main()
