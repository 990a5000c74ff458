"""Busy intervals of the stages: each stage process writes its own; readers get all, or a Chrome trace.

Times are of the monotonic clock, which all processes of one machine share.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from live_avatar.serving.tensors import NO_BLOCK


@dataclass(frozen=True)
class Interval:
    """One stage working on one block (numbered from 0) of one session, in seconds."""

    stage: str
    session: int
    block: int
    start_s: float
    end_s: float


class TraceWriter:
    """Appends intervals to `<folder>/<stage>.jsonl`; without a folder does nothing."""

    def __init__(self, stage: str, file: TextIO | None) -> None:
        self._stage = stage
        self._file = file

    @classmethod
    def to_folder(cls, stage: str, folder: Path | None) -> TraceWriter:
        return cls(stage, (folder / f"{stage}.jsonl").open("a", buffering=1) if folder else None)

    def busy(self, session: int, block: int, start_s: float, end_s: float) -> None:
        if self._file and block != NO_BLOCK:
            self._file.write(json.dumps(asdict(Interval(self._stage, session, block, start_s, end_s))) + "\n")

    def close(self) -> None:
        if self._file:
            self._file.close()


def read_trace(folder: Path) -> list[Interval]:
    """All intervals of a folder, by start."""
    lines = (line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines())
    return sorted((Interval(**json.loads(line)) for line in lines), key=lambda i: i.start_s)


def overlapped_share(intervals: Iterable[Interval]) -> float:
    """Share of the busy time (of any stage) in which at least two stages work on different blocks."""
    edges: list[tuple[float, int, Interval]] = []
    for interval in intervals:
        edges += [(interval.start_s, 1, interval), (interval.end_s, -1, interval)]
    edges.sort(key=lambda edge: (edge[0], edge[1]))
    active: dict[tuple[int, int], int] = defaultdict(int)  # (session, block) -> stages at work on it
    busy = overlapped = 0.0
    last = 0.0
    for at, change, interval in edges:
        working = sum(1 for count in active.values() if count)
        busy += (at - last) if working >= 1 else 0.0
        overlapped += (at - last) if working >= 2 else 0.0
        active[interval.session, interval.block] += change
        last = at
    return overlapped / busy if busy else 0.0


def chrome_trace(intervals: Iterable[Interval]) -> dict[str, Any]:
    """The trace-event document that chrome://tracing and Perfetto open; one row per stage."""
    events = [
        {
            "name": f"block {i.block + 1}",
            "cat": f"session {i.session}",
            "ph": "X",
            "pid": 0,
            "tid": i.stage,
            "ts": i.start_s * 1e6,
            "dur": (i.end_s - i.start_s) * 1e6,
        }
        for i in intervals
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}
