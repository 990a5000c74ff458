"""The paper's Figure 8 from a real trace: warm-up, steady state, and the bubble of Algorithm 4's sink update.

A floor slows down every stage, so that the stages do not compete for the cores: the times are set, the order is not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from live_avatar.serving.trace import Interval, chrome_trace, overlapped_share
from perf.scenario import Context, Figures, Scenario, check
from perf.served import observe
from perf.timeline import Timeline, draw, last_session, sink_bubble, write
from perf.variants import variant

FLOOR_S = 0.25
UPDATE_BLOCK = 2
BLOCKS, QUICK_BLOCKS = 12, 6
WAITING = "waiting"
"""Row of the trace that shows why stages are idle."""


def measure(context: Context) -> Figures:
    artifacts = variant(context.artifacts, f"sink-{UPDATE_BLOCK}", sink_update_block=UPDATE_BLOCK).folder
    with context.server(artifacts=artifacts, stage_floor_s=FLOOR_S) as target:
        observe(target, 1)
        seen = observe(target, QUICK_BLOCKS if context.quick else BLOCKS)
    timeline = last_session(seen.intervals)
    bubble = sink_bubble(timeline, UPDATE_BLOCK)
    write(draw(timeline, bubble), context.picture("timeline"))
    trace = context.picture("timeline").with_suffix(".trace.json")
    write_trace(timeline, bubble, trace)
    return figures_of(timeline, bubble) | {"trace": trace.name}


def figures_of(timeline: Timeline, bubble: tuple[float, float] | None) -> Figures:
    """Warm-up, pace and bubble, with the values that follow from the floor: block 2, normally one stage behind block 1,
    waits until block 1 has passed all steps."""
    steps = len(timeline.stages) - 2
    bubble_s = 0.0 if bubble is None else bubble[1] - bubble[0]
    period_s = timeline.period_s or 0.0
    return {
        "stage_floor_s": FLOOR_S,
        "sink_update_block": UPDATE_BLOCK,
        "blocks": len(timeline.delivered_s),
        "warm_up_s": timeline.delivered_s[0],
        "block_every_s": period_s,
        "bubble_s": bubble_s,
        "share_of_time_with_two_blocks_at_work": overlapped_share(timeline.intervals),
        "checks": [
            check("warm-up by floors of all stages", timeline.delivered_s[0] / FLOOR_S / (steps + 2), at_most=1.1),
            check("time from block to block by the floor", period_s / FLOOR_S, at_most=1 / 0.95),
            check("bubble by the floor", bubble_s / FLOOR_S, at_least=1.0, at_most=steps),
        ],
    }


def write_trace(timeline: Timeline, bubble: tuple[float, float] | None, path: Path) -> None:
    """The document that Perfetto and chrome://tracing open: a row per stage, and one for warm-up and sink update."""
    document = chrome_trace(timeline.intervals)
    waits = {"warm-up": (0.0, timeline.delivered_s[0])} | ({} if bubble is None else {"AAS: new sink": bubble})
    document["traceEvents"] += list(_waits(waits.items()))
    path.write_text(json.dumps(document))


def _waits(spans: Iterable[tuple[str, tuple[float, float]]]) -> Iterable[dict[str, Any]]:
    for name, (begin_s, end_s) in spans:
        (event,) = chrome_trace([Interval(WAITING, 0, 0, begin_s, end_s)])["traceEvents"]
        yield {**event, "name": name, "cat": WAITING}


SCENARIO = Scenario("timeline", "when each stage works on which block, from a real trace", measure, ("onnxruntime",))
