"""The record of a stage: a CSV of its figures over steps, and a picture of it.

Rows have no times, so a resumed run writes the same file as an uninterrupted one.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from training.checkpoints import write_text, write_whole
from training.errors import TrainingError

Figures = Mapping[str, float]
Row = dict[str, str]


class CSVLog:
    """Rows of figures by step, appended to a file; a figure that appears later gets a new column."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[Row]:
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def cut(self, step: int) -> None:
        """Drops rows of later steps, which a run wrote after its last checkpoint."""
        rows = self.rows()
        kept = [row for row in rows if (row["step"] or "").isdigit() and int(row["step"]) <= step]
        if len(kept) < len(rows):
            self._rewrite(kept)

    def append(self, step: int, figures: Figures) -> None:
        """Adds a row. Raises `TrainingError` if it cannot be written."""
        row = {"step": str(step), **{name: f"{value:.6g}" for name, value in figures.items()}}
        rows = self.rows()
        if not rows or row.keys() - rows[0].keys():
            self._rewrite([*rows, row])
            return
        try:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, list(rows[0]), lineterminator="\n").writerow(row)
        except OSError as error:
            raise TrainingError(
                f"{self.path} cannot be written ({error.strerror}); mend that and run the same command again: it goes "
                "on from the last checkpoint."
            ) from error

    def _rewrite(self, rows: Sequence[Row]) -> None:
        columns = list(dict.fromkeys(name for row in rows for name in row)) or ["step"]
        out = io.StringIO()
        writer = csv.DictWriter(out, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path, out.getvalue())


def mean(rows: Sequence[Figures]) -> dict[str, float]:
    """The mean of every figure over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}


def plot(training: CSVLog, validation: CSVLog, path: Path) -> None:
    """Draws every figure against the step as PNG, one panel each, with the validation's figure in the same panel."""
    from matplotlib.figure import Figure

    logs = {"training": training.rows(), "validation": validation.rows()}
    names = list(dict.fromkeys(name for rows in logs.values() for row in rows for name in row if name != "step"))
    if not names:
        return
    figure = Figure(figsize=(7, 2.2 * len(names)), layout="constrained")
    for panel, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
        for label, rows in logs.items():
            points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
            if points:
                panel.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 50 else None)
        panel.set_ylabel(name)
        if all(float(row[name]) > 0 for rows in logs.values() for row in rows if row.get(name)):
            panel.set_yscale("log")
        panel.legend()
    panel.set_xlabel("step")
    write_whole(path, lambda place: figure.savefig(place, format="png", dpi=100))
