"""The serving path alone: stages have a floor on their time, so neither networks nor cores limit the pipe.

It measures how close the pipe comes to the rate of its slowest stage, and the cost of passing a block from stage to
stage, with small and large frames. FPS is set by the floor (`ServerOptions.stage_floor_s`), not by the networks.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from live_avatar.config import TINY
from live_avatar.exporter.build import export_artifacts
from live_avatar.weights.checkpoint import open_checkpoint
from live_avatar_client.protocol import FRAMES_PER_BLOCK
from perf.counters import watched
from perf.figures import hops, passing, pipeline_efficiency, slowest, stage_times, summary_of, throughput
from perf.load import Speaker
from perf.scenario import Context, Figures, Scenario, check

FLOOR_S = 0.3
BLOCKS, QUICK_BLOCKS = 60, 8
LARGE = (400, 720)
"""Height and width of the paper's frames."""
ALONE_BLOCKS, LARGE_BLOCKS = 12, 4
PATIENCE_S = 600.0
LEAST_EFFICIENCY = 0.95
STEADY = 5


def measure(context: Context) -> Figures:
    blocks = QUICK_BLOCKS if context.quick else BLOCKS
    small = _floored(context, blocks)
    figures: Figures = {
        "measures": "the serving path: every stage is held to a floor, so FPS says nothing of the networks",
        "floor_s": FLOOR_S,
        "frames_96x96": small,
        "checks": [check("pipeline efficiency", small["efficiency"], at_least=LEAST_EFFICIENCY)],
    }
    if not context.quick:
        with tempfile.TemporaryDirectory() as folder:
            large = dataclasses.replace(context, artifacts=_large_artifacts(Path(folder)))
            figures["frames_720x400"] = _one_at_a_time(large, LARGE_BLOCKS)
    return figures


def _floored(context: Context, blocks: int) -> Figures:
    with context.server(stage_floor_s=FLOOR_S) as target, tempfile.TemporaryDirectory() as scratch:
        speaker = Speaker(target, Path(scratch))
        speaker.warm_up()
        run = speaker.analyzed(blocks, rate=blocks)
        full = speaker.intervals(run.blocks)
        single = speaker.analyzed(QUICK_BLOCKS if context.quick else ALONE_BLOCKS, None)
        alone = speaker.intervals(single.blocks)
    stages, seen = stage_times(full, skipped=STEADY), throughput(run.blocks)
    name, slowest_s = slowest(stages)
    assert seen.steady_fps is not None
    return {
        "blocks": blocks,
        "throughput": seen,
        "stages": stages,
        "slowest_stage": {"name": name, "mean_s": slowest_s},
        "efficiency": pipeline_efficiency(seen.steady_fps, FRAMES_PER_BLOCK, slowest_s),
        "efficiency_with_the_fill": pipeline_efficiency(seen.fps, FRAMES_PER_BLOCK, slowest_s),
        "hop_s": summary_of(hops(full)),
        "passing": passing(single.blocks, alone),
    }


def _one_at_a_time(context: Context, blocks: int) -> Figures:
    """One block in the pipe at a time, so no block waits for a stage."""
    with context.server(idle_seconds=PATIENCE_S) as target, tempfile.TemporaryDirectory() as scratch:
        speaker = Speaker(target, Path(scratch))
        with watched(target.metrics_url) as since:
            run = speaker.analyzed(blocks, None)
            statistics = since()
        intervals = speaker.intervals(run.blocks)
    return {"blocks": blocks, "passing": passing(run.blocks, intervals), "statistics": statistics}


def _large_artifacts(folder: Path) -> Path:
    """TINY's networks for large frames."""
    checkpoint = open_checkpoint(TINY)
    height, width = LARGE
    large = dataclasses.replace(checkpoint, preset=checkpoint.preset.with_stream(height=height, width=width))
    export_artifacts(large, folder, lambda component: None)
    return folder


SCENARIO = Scenario("pipeline", "the serving path by itself: stages held to a floor, and what a hop costs", measure)
