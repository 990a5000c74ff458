"""10,000 seconds of video in one session: speed, latency and memory of every process, early and late.

Ctrl-C or SIGTERM ends it early, with the figures of the part that was run (`finished` is false).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from live_avatar.arrays import Array
from live_avatar_client import Block
from live_avatar_client.protocol import FPS, FRAMES_PER_BLOCK
from perf.figures import BlockTimes, latency, throughput
from perf.growth import Memory, Slope, group
from perf.load import Speaker, demo_blocks
from perf.report import lines_picture
from perf.scenario import Context, Figures, Scenario, check

VIDEO_S, QUICK_VIDEO_S = 10_000.0, 30.0
SAMPLE_BLOCKS, QUICK_SAMPLE_BLOCKS = 20, 2
"""Number of blocks between samples of memory. It counts blocks, not time, so a pause does not matter."""
WINDOW_BLOCKS = 200
PATIENCE_S = 3600.0
MOST_GROWTH_MIB = 10.0
"""Largest growth of a process per hour of video, beyond three standard errors, after the warm-up."""
WARM_UP = 0.2
DEMO_BLOCKS = 12
LEAST_BLOCKS = 30


@dataclass
class Seen:
    """The received blocks, and samples of memory by seconds of video; times in seconds."""

    memory: Memory
    pids: tuple[int, ...]
    every: int
    blocks: list[BlockTimes] = field(default_factory=list)
    frames: int = 0

    def __call__(self, block: Block) -> None:
        self.blocks.append(BlockTimes.of(block))
        self.frames += len(block)
        if len(self.blocks) % self.every == 0:
            self.memory.sample(group(self.pids), self.frames / FPS)


def measure(context: Context) -> Figures:
    video_s = QUICK_VIDEO_S if context.quick else VIDEO_S
    every = QUICK_SAMPLE_BLOCKS if context.quick else SAMPLE_BLOCKS
    blocks = round(video_s * FPS / FRAMES_PER_BLOCK)
    begun_s = time.monotonic()
    with context.server(idle_seconds=PATIENCE_S) as target, tempfile.TemporaryDirectory() as scratch:
        assert target.pids
        speaker = Speaker(target, Path(scratch))
        speaker.warm_up()
        seen = Seen(Memory(target.pids[0]), target.pids, every)
        try:
            speaker.streamed(speech(blocks), seen)
        except KeyboardInterrupt:
            if len(seen.blocks) < LEAST_BLOCKS:
                raise
    return _figures(context, seen, blocks, time.monotonic() - begun_s)


def speech(blocks: int) -> Iterator[Array]:
    """The demo's speech, repeated; made lazily."""
    spoken = demo_blocks(DEMO_BLOCKS)
    for block in range(blocks):
        yield spoken[block % DEMO_BLOCKS]


def _figures(context: Context, seen: Seen, blocks: int, wall_s: float) -> Figures:
    window = min(WINDOW_BLOCKS, len(seen.blocks) // 4)
    early, late = window_figures(seen.blocks[window : 2 * window]), window_figures(seen.blocks[-window:])
    video_s, answered = seen.frames / FPS, len(seen.blocks)
    findings = seen.memory.findings(WARM_UP * video_s)
    _picture(context, seen)
    return {
        "finished": answered == blocks,
        "video_s": video_s,
        "frames": seen.frames,
        "wall_s": wall_s,
        "throughput": throughput(seen.blocks),
        "early": early,
        "late": late,
        "late_by_early_fps": late["fps"] / early["fps"],
        "memory_mib_by_hour_of_video": findings,
        "checks": [
            check("frames by those due", seen.frames / (answered * FRAMES_PER_BLOCK), at_least=1.0),
            *(_flat(one["name"], Slope(**one["slope"])) for one in findings if one["slope"] is not None),
        ],
    }


def window_figures(blocks: Sequence[BlockTimes]) -> Figures:
    """Medians over neighbouring blocks, so a pause does not matter."""
    received = np.array([b.received_s for b in blocks])
    return {"fps": FRAMES_PER_BLOCK / float(np.median(np.diff(received))), "latency": latency(blocks, skipped=0)}


def _flat(name: str, slope: Slope) -> Figures:
    least = slope.mib_per_hour - 3 * slope.error
    return check(f"{name}: MiB per hour of video, less 3 errors", least, at_most=MOST_GROWTH_MIB)


def _picture(context: Context, seen: Seen) -> None:
    series = {name: (one.times_s, one.mib) for (name, _), one in seen.memory.series.items() if len(one.mib) > 1}
    lines_picture(
        context.picture("long"), "Memory of every process, one session", "seconds of video", "private MiB", series
    )


SCENARIO = Scenario("long", "10,000 s of video in one session: speed, latency and memory, early and late", measure)
