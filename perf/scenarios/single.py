"""One session at full speed: through Triton with two clients, and with Algorithm 3 in one process."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from live_avatar.assets import DEMO_PROMPT, PORTRAIT
from live_avatar.graphs.artifacts import load_artifacts
from live_avatar.pipeline.generator import Generator
from live_avatar.runtime.onnx_runtime import OnnxRuntime
from live_avatar.serving.trace import Interval
from live_avatar_client.protocol import FPS
from perf.counters import watched
from perf.figures import first_frame, hops, slowest, stage_times, summary_of, throughput
from perf.load import Speaker, demo_blocks
from perf.report import busy_picture
from perf.scenario import Context, Figures, Scenario, check

BLOCKS, QUICK_BLOCKS = 50, 8
STEADY = 5
"""Number of blocks after which the sink is replaced and the pipe is full."""


def measure(context: Context) -> Figures:
    blocks = QUICK_BLOCKS if context.quick else BLOCKS
    with context.server() as target, tempfile.TemporaryDirectory() as scratch:
        speaker = Speaker(target, Path(scratch))
        speaker.warm_up()
        with watched(target.metrics_url) as since:
            run = speaker.analyzed(blocks, rate=blocks)
            statistics = since()
        library = throughput(speaker.spoken(blocks, realtime=False))
        stages = speaker.intervals(run.blocks)
    through_triton = throughput(run.blocks)
    in_process = generate_fps(context.artifacts, blocks)
    figures: Figures = {
        "blocks": blocks,
        "command_of_perf_analyzer": " ".join(run.command),
        "perf_analyzer": run.version,
        "throughput": through_triton,
        "throughput_client_library": library,
        "generate_fps": in_process,
        "statistics": statistics,
        "checks": [
            check("FPS end to end", through_triton.fps, at_least=FPS),
            check("FPS by FPS of `generate`", through_triton.fps / in_process, at_least=1.0),
        ],
    }
    if stages:
        figures |= _of_stages(stages)
        figures["ttff_speech_at_hand"] = first_frame(run.blocks[0], stages)
        busy_picture(figures["stages"], context.picture("single"))
    return figures


def generate_fps(artifacts: Path, blocks: int) -> float:
    """FPS of `live-avatar generate` without writing its file: Algorithm 3 on the same graphs, with a known avatar."""
    generator = Generator(OnnxRuntime(load_artifacts(artifacts)))

    def generated(count: int) -> int:
        speech = demo_blocks(count).reshape(-1)
        return sum(len(b.frames) for b in generator.generate(PORTRAIT.read_bytes(), DEMO_PROMPT, 0, speech))

    generated(STEADY + 1)
    begun_s = time.monotonic()
    return generated(blocks) / (time.monotonic() - begun_s)


def _of_stages(intervals: list[Interval]) -> Figures:
    stages = stage_times(intervals, skipped=STEADY)
    name, slowest_s = slowest(stages)
    return {
        "stages": stages,
        "slowest_stage": {"name": name, "mean_s": slowest_s},
        "hop_s": summary_of(hops(intervals)),
    }


SCENARIO = Scenario("single", "one session, as fast as it goes", measure, ("onnxruntime", "tritonclient"))
