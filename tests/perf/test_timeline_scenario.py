"""The sink's bubble is found where it is, drawn, and written for Perfetto; on times of the model of the pipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perf.scenario import broken
from perf.scenarios.timeline import FLOOR_S, WAITING, figures_of, write_trace
from perf.schedule import Client, Pipeline, StageWork, simulate
from perf.timeline import BUBBLE, Timeline, draw, last_session, sink_bubble

STAGES = ("conditioning", "dit_step_1", "dit_step_2", "dit_step_3", "dit_step_4", "vae_decoder")


def session(update_block: int | None, blocks: int = 8) -> Timeline:
    stages = tuple(StageWork(name, name, (FLOOR_S,)) for name in STAGES)
    return last_session(simulate(Pipeline(stages, sink_update_block=update_block), [Client(blocks)]).intervals)


def test_the_bubble_of_algorithm_4() -> None:
    """Block 2 is conditioned while block 1 is in step 1, and waits for it to pass three more steps."""
    timeline = session(update_block=2)
    bubble = sink_bubble(timeline, 2)
    assert bubble == pytest.approx((2 * FLOOR_S, 5 * FLOOR_S))
    figures = figures_of(timeline, bubble)
    assert figures["bubble_s"] == pytest.approx(3 * FLOOR_S)
    assert figures["warm_up_s"] == pytest.approx(6 * FLOOR_S)
    assert broken(figures) == []


def test_no_bubble_where_the_sink_is_there_in_time() -> None:
    begin, end = sink_bubble(session(update_block=5), 5) or (0.0, 1.0)
    assert begin == pytest.approx(end)
    assert sink_bubble(session(update_block=None), None) is None
    assert sink_bubble(session(update_block=5, blocks=4), 5) is None


def test_figures_say_what_does_not_hold() -> None:
    timeline = session(update_block=5)
    assert broken(figures_of(timeline, sink_bubble(timeline, 5))) == ["bubble by the floor is 0, must be at least 1"]


def test_the_picture_shades_the_bubble() -> None:
    timeline = session(update_block=2)
    shade = tuple(bytes.fromhex(BUBBLE[1:]))
    counts = [{c: n for n, c in draw(timeline, b).getcolors(1 << 20) or []} for b in (None, sink_bubble(timeline, 2))]
    assert shade not in counts[0]
    assert counts[1][shade] > 1000


def test_the_trace_has_a_row_for_every_stage_and_one_for_waits(tmp_path: Path) -> None:
    timeline = session(update_block=2)
    write_trace(timeline, sink_bubble(timeline, 2), tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert {event["tid"] for event in events} == {*STAGES, WAITING}
    (bubble,) = (event for event in events if event["name"] == "AAS: new sink")
    assert (bubble["ts"], bubble["dur"]) == pytest.approx((2 * FLOOR_S * 1e6, 3 * FLOOR_S * 1e6))
