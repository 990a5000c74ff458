"""The definition of every figure, as a pure function of times.

FPS, TTFF and their parts are defined as in the paper (arXiv 2512.04677, supplement, section 10): FPS counts all work
from the start of inference; TTFF is the wait for the block boundary, the denoising of the first block and its decoding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any

import numpy as np

from live_avatar.serving.trace import Interval
from live_avatar_client import Block
from live_avatar_client.protocol import FPS

FRAME_S = 1 / FPS
BUFFER_S = 0.2
"""Playback delay of a player against jitter; without it, a block that is a little late stalls playback."""


@dataclass(frozen=True)
class BlockTimes:
    """One block of one session, as its client saw it: its number of frames, and its times."""

    frames: int
    begun_s: float
    """When its first sample was spoken."""
    complete_s: float
    """When its last sample was spoken."""
    sent_s: float
    received_s: float

    @classmethod
    def of(cls, block: Block) -> BlockTimes:
        times = (block.audio_started_at_s, block.audio_complete_at_s, block.sent_at_s, block.received_at_s)
        return cls(len(block), *times)


@dataclass(frozen=True)
class Throughput:
    """`fps` counts from the first block sent to the last received, `steady_fps` from the first received."""

    frames: int
    duration_s: float
    fps: float
    steady_fps: float | None


@dataclass(frozen=True)
class FirstFrame:
    """TTFF as the client saw it, and its parts as the stages saw them. The rest is transport and queues."""

    ttff_s: float
    block_wait_s: float
    denoising_s: float
    """Time of conditioning and all steps for the start and block 1."""
    decoding_s: float
    rest_s: float
    over_parts: float
    """TTFF as the sum of its three parts."""


@dataclass(frozen=True)
class Latency:
    """Audio to frame: from the last sample of a block to its frames, over all blocks but the first `skipped`."""

    p50_s: float
    p95_s: float
    p99_s: float
    longest_s: float
    blocks: int


@dataclass(frozen=True)
class Playback:
    """Playback at 25 frames per second: how often the next frame was missing, and for how long."""

    stalls: int
    stalled_s: float
    longest_gap_s: float
    """The longest time that one frame was shown, less its own 0.04 s."""


@dataclass(frozen=True)
class Passing:
    """Time of a block outside the stages' work: medians over the blocks of a session with one block in flight."""

    in_s: float
    """From the client's send to the start of the first stage."""
    hop_s: float
    """From the end of one stage to the start of the next."""
    out_s: float
    """From the end of the last stage to the client's receipt of the frames."""
    share: float
    """All of it, as a share of the time from send to receipt."""


@dataclass(frozen=True)
class StageTimes:
    """One stage: its time per block, and the share of the window in which it was busy."""

    blocks: int
    mean_s: float
    median_s: float
    busy_share: float


def throughput(blocks: Sequence[BlockTimes]) -> Throughput:
    """Throughput of one session, or of several in one window."""
    first, last = min(b.sent_s for b in blocks), max(b.received_s for b in blocks)
    ordered = sorted(blocks, key=lambda b: b.received_s)
    frames, after = sum(b.frames for b in blocks), last - ordered[0].received_s
    steady = sum(b.frames for b in ordered[1:]) / after if after > 0 else None
    return Throughput(frames, last - first, frames / (last - first), steady)


def first_frame(block: BlockTimes, stages: Iterable[Interval]) -> FirstFrame:
    """`stages`: the session's intervals of its start and its first block. The stage that starts last is the decoder."""
    at_work = sorted((i for i in stages if i.block <= 0), key=lambda i: i.start_s)
    last = at_work[-1].stage
    decoding_s = sum(i.end_s - i.start_s for i in at_work if i.stage == last)
    denoising_s = sum(i.end_s - i.start_s for i in at_work if i.stage != last)
    ttff_s, wait_s = block.received_s - block.begun_s, block.complete_s - block.begun_s
    parts_s = wait_s + denoising_s + decoding_s
    return FirstFrame(ttff_s, wait_s, denoising_s, decoding_s, ttff_s - parts_s, ttff_s / parts_s)


def latency(blocks: Sequence[BlockTimes], skipped: int = 1) -> Latency:
    """Of one session in steady state, without the first blocks, which include its start."""
    waits_s = [b.received_s - b.complete_s for b in blocks[skipped:]]
    p50, p95, p99, longest = (float(p) for p in np.percentile(waits_s, (50, 95, 99, 100)))
    return Latency(p50, p95, p99, longest, len(waits_s))


def playback(blocks: Sequence[BlockTimes], buffer_s: float = BUFFER_S) -> Playback:
    """Of one session. The player starts `buffer_s` after its first frame arrived, shows each frame for 0.04 s,
    and waits for late frames."""
    stalls, stalled_s, longest_s = 0, 0.0, 0.0
    free_s = blocks[0].received_s + buffer_s
    for block in blocks:
        late_s = block.received_s - free_s
        if late_s > 0:
            stalls, stalled_s, longest_s = stalls + 1, stalled_s + late_s, max(longest_s, late_s)
        free_s = max(free_s, block.received_s) + block.frames * FRAME_S
    return Playback(stalls, stalled_s, longest_s)


def real_time_sessions(stalls: Mapping[int, int]) -> int:
    """The most sessions at once without a stall, from stalls by number of sessions; it ends at the first stall."""
    good = 0
    for sessions in sorted(stalls):
        if stalls[sessions]:
            break
        good = sessions
    return good


def stage_times(intervals: Iterable[Interval], skipped: int = 0) -> dict[str, StageTimes]:
    """By stage, in the order of the pipe. Times are of the blocks from `skipped` on, without a session's start; shares
    are of all blocks, from the first start to the last end."""
    by_stage: defaultdict[str, list[Interval]] = defaultdict(list)
    for interval in sorted(intervals, key=lambda i: (i.block, i.start_s)):
        by_stage[interval.stage].append(interval)
    every = [i for found in by_stage.values() for i in found]
    window_s = max(i.end_s for i in every) - min(i.start_s for i in every)
    return {stage: _stage_times(found, skipped, window_s) for stage, found in by_stage.items()}


def _stage_times(found: Sequence[Interval], skipped: int, window_s: float) -> StageTimes:
    times = [i.end_s - i.start_s for i in found if i.block >= skipped]
    return StageTimes(len(times), fmean(times), median(times), sum(i.end_s - i.start_s for i in found) / window_s)


def slowest(stages: Mapping[str, StageTimes]) -> tuple[str, float]:
    """The slowest stage and its mean time per block."""
    name = max(stages, key=lambda stage: stages[stage].mean_s)
    return name, stages[name].mean_s


def pipeline_efficiency(fps: float, frames_per_block: int, slowest_s: float) -> float:
    """FPS as a share of the slowest stage's own rate; 1 means that this stage never waits."""
    return fps * slowest_s / frames_per_block


def hops(intervals: Iterable[Interval]) -> list[float]:
    """Seconds from a block's end in one stage to its start in the next, if the next stage was idle."""
    paths: defaultdict[tuple[int, int], list[Interval]] = defaultdict(list)
    worked: defaultdict[str, list[float]] = defaultdict(list)
    for interval in sorted(intervals, key=lambda i: i.start_s):
        paths[interval.session, interval.block].append(interval)
        worked[interval.stage].append(interval.end_s)
    steps = (pair for path in paths.values() for pair in pairwise(path))
    return [after.start_s - before.end_s for before, after in steps if _was_idle(worked[after.stage], before, after)]


def passing(blocks: Sequence[BlockTimes], intervals: Iterable[Interval], skipped: int = 1) -> Passing:
    """Of one session's blocks in order and the stages' intervals, without the session's start."""
    ways: defaultdict[int, list[Interval]] = defaultdict(list)
    for interval in sorted(intervals, key=lambda i: i.start_s):
        ways[interval.block].append(interval)
    pairs = [(block, ways[number]) for number, block in enumerate(blocks) if number >= skipped]
    gaps_s = [after.start_s - before.end_s for _, way in pairs for before, after in pairwise(way)]
    idle = [1 - sum(i.end_s - i.start_s for i in way) / (block.received_s - block.sent_s) for block, way in pairs]
    return Passing(
        median(way[0].start_s - block.sent_s for block, way in pairs),
        median(gaps_s),
        median(block.received_s - way[-1].end_s for block, way in pairs),
        median(idle),
    )


def _was_idle(ends: Sequence[float], before: Interval, after: Interval) -> bool:
    """Whether the stage of `after` had ended its work when `before` ended."""
    return not any(before.end_s < end <= after.start_s for end in ends)


def summary_of(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 95th percentile and count of the times."""
    p50, p95 = (float(p) for p in np.percentile(seconds, (50, 95)))
    return {"median_s": p50, "p95_s": p95, "samples": len(seconds)}


def per_session(mib_by_sessions: Mapping[int, float]) -> float:
    """MiB for one more session: the slope of memory over sessions (needs at least two numbers of sessions)."""
    counts, mib = zip(*sorted(mib_by_sessions.items()), strict=True)
    return float(np.polyfit(counts, mib, 1)[0])


def rounded(figures: Any, digits: int = 5) -> Any:
    """Figures as JSON values with `digits` significant digits; dataclasses as objects."""
    if hasattr(figures, "__dataclass_fields__"):
        return rounded(asdict(figures), digits)
    if isinstance(figures, Mapping):
        return {str(name): rounded(value, digits) for name, value in figures.items()}
    if isinstance(figures, list | tuple):
        return [rounded(value, digits) for value in figures]
    return float(f"{figures:.{digits}g}") if isinstance(figures, float) else figures
