"""Filters of clips by their figures, and the table of figures that is shown before anything is dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from live_avatar.config import FPS
from live_avatar_client.text import printable
from training.videos.measures import quantiles

SECONDS = "seconds"
NO_CLIP = "less than a clip"
NAMED = 20  # unusable files that the table names; the report names all


@dataclass(frozen=True)
class Filters:
    """Bounds of what is kept; None keeps all. min_seconds: files must be longer, as in the paper (section 5.1)."""

    min_seconds: float | None = 10.0
    min_speech: float | None = None
    max_cut: float | None = None
    max_still: float | None = None
    min_sync: float | None = None

    def file_fault(self, seconds: float, clips: int) -> str | None:
        """The reason why a whole file is dropped."""
        if self.min_seconds is not None and seconds <= self.min_seconds:
            return SECONDS
        return None if clips else NO_CLIP

    def clip_fault(self, figures: dict[str, float]) -> str | None:
        """The first reason why a clip is dropped, by the name of its figure."""
        for name, bound in self.lower().items():
            if bound is not None and figures[name] < bound:
                return name
        for name, bound in self.upper().items():
            if bound is not None and figures[name] > bound:
                return name
        return None

    def lower(self) -> dict[str, float | None]:
        return {"speech": self.min_speech, "sync": self.min_sync}

    def upper(self) -> dict[str, float | None]:
        return {"cut": self.max_cut, "still": self.max_still}


@dataclass(frozen=True)
class Measured:
    """A file after the measuring pass: its seconds and each clip's figures, or why it cannot be used."""

    name: str
    seconds: float = 0.0
    track: str = ""
    clips: list[dict[str, float]] = field(default_factory=list)
    fault: str | None = None

    def kept(self, filters: Filters) -> list[int]:
        """Numbers of the clips that pass."""
        if self.fault is not None or filters.file_fault(self.seconds, len(self.clips)) is not None:
            return []
        return [number for number, figures in enumerate(self.clips) if filters.clip_fault(figures) is None]


def report(files: Sequence[Measured], filters: Filters, blocks: int, block_frames: int) -> dict[str, Any]:
    """What there is and what the filters drop: counts of files and clips by reason, quantiles of every figure."""
    usable = [one for one in files if one.fault is None]
    kept = [one for one in usable if filters.file_fault(one.seconds, len(one.clips)) is None]
    dropped = Counter(filters.file_fault(one.seconds, len(one.clips)) for one in usable)
    clips = [figures for one in kept for figures in one.clips]
    clip_drops = Counter(filters.clip_fault(figures) for figures in clips)
    passing = sum(len(one.kept(filters)) for one in kept)
    figures = {name: [clip[name] for clip in clips] for name in (clips[0] if clips else ())}
    return {
        "files": len(files),
        "unusable": {one.name: one.fault for one in files if one.fault is not None},
        "files_dropped": {reason: count for reason, count in dropped.items() if reason is not None},
        "clips": len(clips),
        "clips_dropped": {reason: count for reason, count in clip_drops.items() if reason is not None},
        "clips_kept": passing,
        "seconds_kept": round(passing * blocks * block_frames / FPS, 2),
        "figures": {
            **({SECONDS: _rounded([one.seconds for one in usable])} if usable else {}),
            **{name: _rounded(values) for name, values in figures.items()},
        },
    }


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 3) for value in quantiles(values)]


def table(found: dict[str, Any], filters: Filters) -> str:
    """The report as text."""
    bounds = {
        SECONDS: "-" if filters.min_seconds is None else f"> {filters.min_seconds:g}",
        **{name: "-" if bound is None else f">= {bound:g}" for name, bound in filters.lower().items()},
        **{name: "-" if bound is None else f"<= {bound:g}" for name, bound in filters.upper().items()},
    }
    lines = [f"{'figure':<10}{'least':>9}{'5 %':>9}{'median':>9}{'95 %':>9}{'most':>9}{'kept if':>10}{'drops':>12}"]
    for name, values in found["figures"].items():
        cells = "".join(f"{value:>9.3g}" for value in values)
        lines.append(f"{name:<10}{cells}{bounds.get(name, '-'):>10}{_drops(name, found):>12}")
    lines += [f"{NO_CLIP}: {count} files" for reason, count in found["files_dropped"].items() if reason == NO_CLIP]
    unusable = found["unusable"]
    lines.append(f"{found['files']} files, {len(unusable)} of them unusable; {found['clips_kept']} clips are kept, "
                 f"{found['seconds_kept']:g} s.")  # fmt: skip
    lines += [f"  {printable(fault)}" for fault in list(unusable.values())[:NAMED]]
    if len(unusable) > NAMED:
        lines.append(f"  and {len(unusable) - NAMED} more, which the report names")
    return "\n".join(lines)


def _drops(name: str, found: dict[str, Any]) -> str:
    if name == SECONDS:
        return f"{found['files_dropped'].get(SECONDS, 0)} files"
    return f"{found['clips_dropped'].get(name, 0)} clips"
