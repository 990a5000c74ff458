"""One session with speech in real time: latency and playback for its viewer."""

from __future__ import annotations

import tempfile
from pathlib import Path

from live_avatar_client.protocol import FPS
from perf.analyzer import REAL_TIME
from perf.counters import watched
from perf.figures import BlockTimes, first_frame, latency, playback, stage_times, throughput
from perf.load import Speaker
from perf.report import lines_picture
from perf.scenario import Context, Figures, Scenario, check

BLOCKS, QUICK_BLOCKS = 100, 8
MOST_OVER_PARTS = 1.10


def measure(context: Context) -> Figures:
    blocks = QUICK_BLOCKS if context.quick else BLOCKS
    with context.server() as target, tempfile.TemporaryDirectory() as scratch:
        speaker = Speaker(target, Path(scratch))
        speaker.warm_up()
        with watched(target.metrics_url) as since:
            chunks = speaker.spoken(blocks)
            statistics = since()
        run = speaker.analyzed(blocks, rate=REAL_TIME)
        whole = run.blocks
        stages = {name: speaker.intervals(of) for name, of in (("chunks", chunks), ("whole", whole))}
    figures: Figures = {
        "blocks": blocks,
        "chunks_of_20_ms": _seen(chunks),
        "whole_blocks": {"command_of_perf_analyzer": " ".join(run.command), **_seen(whole)},
        "perf_analyzer": run.version,
        "statistics": statistics,
        "checks": [
            check("FPS by playback's", (throughput(chunks).steady_fps or 0.0) / FPS, at_least=0.98),
            check("stalls", playback(chunks).stalls, at_most=0),
        ],
    }
    if stages["chunks"]:
        first = first_frame(chunks[0], stages["chunks"])
        figures["chunks_of_20_ms"] |= {"ttff": first, "stages": stage_times(stages["chunks"], skipped=1)}
        figures["whole_blocks"]["ttff"] = first_frame(whole[0], stages["whole"])
        figures["checks"].append(check("TTFF by the sum of its parts", first.over_parts, at_most=MOST_OVER_PARTS))
    waits = {"chunks of 20 ms (client library)": chunks, "whole blocks (perf_analyzer)": whole}
    lines_picture(
        context.picture("realtime"),
        "Audio-to-frame latency, speech at its own pace",
        "block of 0.48 s",
        "last sample to frames, ms",
        {name: _latencies(of) for name, of in waits.items()},
    )
    return figures


def _seen(blocks: list[BlockTimes]) -> Figures:
    return {
        "throughput": throughput(blocks),
        "latency": latency(blocks),
        "playback": playback(blocks),
        "playback_without_buffer": playback(blocks, buffer_s=0.0),
    }


def _latencies(blocks: list[BlockTimes]) -> tuple[list[float], list[float]]:
    return [float(n) for n in range(1, len(blocks) + 1)], [(b.received_s - b.complete_s) * 1e3 for b in blocks]


SCENARIO = Scenario("realtime", "speech at its own pace, in chunks of 20 ms", measure, ("tritonclient",))
