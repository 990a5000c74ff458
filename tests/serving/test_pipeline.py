"""Timestep-forcing pipeline parallelism, shown on traces of the real server."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest

from live_avatar.arrays import Array
from live_avatar.serving import metrics
from live_avatar.serving.server import TritonServer
from live_avatar.serving.trace import Interval, chrome_trace, overlapped_share, read_trace
from tests.cli.support import wait_until
from tests.serving.raw import BLOCK, NOTHING, raw_session
from tests.serving.support import received, scrape, scratch_of, series

CHAIN = ["conditioning", "dit_step_1", "dit_step_2", "dit_step_3", "dit_step_4", "vae_decoder"]


@pytest.fixture(scope="module")
def trace(slow_server: TritonServer, picture: bytes, speech: Array) -> list[Interval]:
    received(slow_server.options.url, picture, speech)
    assert slow_server.options.trace is not None
    intervals = read_trace(slow_server.options.trace)
    latest = max(intervals, key=lambda interval: interval.end_s).session  # other tests have used the server, too
    return [interval for interval in intervals if interval.session == latest]


def by_stage(trace: list[Interval]) -> dict[str, list[Interval]]:
    stages: dict[str, list[Interval]] = defaultdict(list)
    for interval in trace:
        stages[interval.stage].append(interval)
    return stages


def test_every_stage_works_on_every_block_in_order(trace: list[Interval]) -> None:
    stages = by_stage(trace)
    assert sorted(stages) == sorted(CHAIN)
    for name in CHAIN:
        assert [interval.block for interval in stages[name]] == list(range(8)), name


def test_a_block_passes_the_stages_in_order(trace: list[Interval]) -> None:
    stages = by_stage(trace)
    for earlier, later in itertools.pairwise(CHAIN):
        for before, after in zip(stages[earlier], stages[later], strict=True):
            assert before.end_s <= after.start_s, f"{later} began block {after.block} before {earlier} had ended it"


def test_steps_work_on_different_blocks_at_once(trace: list[Interval]) -> None:
    """In the steady state, while step 4 is at block i, step 3 is at block i + 1, step 2 at i + 2."""
    stages = by_stage(trace)

    def together(a: Interval, b: Interval) -> bool:
        return max(a.start_s, b.start_s) < min(a.end_s, b.end_s)

    for block in range(4):
        last = stages["dit_step_4"][block]
        assert together(last, stages["dit_step_3"][block + 1]), f"block {block}"
        assert any(together(last, stages["dit_step_2"][later]) for later in (block + 1, block + 2)), f"block {block}"


def test_throughput_is_set_by_one_stage_and_not_by_their_sum(trace: list[Interval]) -> None:
    """Blocks leave faster than in sequence, where each would take the six stages together and nothing would overlap.

    How much faster is a question of the cores that are free: perf/ measures it.
    """
    decoded = by_stage(trace)["vae_decoder"]
    # The first three intervals pay for the start of the session; the rest are the steady state.
    pace_s = (decoded[-1].end_s - decoded[3].end_s) / (len(decoded) - 4)
    in_sequence_s = sum(stage[-1].end_s - stage[-1].start_s for stage in by_stage(trace).values())
    assert pace_s < in_sequence_s / 2, f"{pace_s:.3f} s a block, {in_sequence_s:.3f} s in sequence"
    assert overlapped_share(trace) > 0.25


def test_share_of_overlap_of_known_traces() -> None:
    apart = [Interval("a", 1, 0, 0.0, 1.0), Interval("b", 1, 0, 1.0, 2.0)]
    assert overlapped_share(apart) == 0.0
    half = [Interval("a", 1, 1, 0.0, 2.0), Interval("b", 1, 0, 1.0, 2.0)]
    assert overlapped_share(half) == pytest.approx(0.5)
    same_block = [Interval("a", 1, 0, 0.0, 2.0), Interval("b", 1, 0, 0.0, 2.0)]
    assert overlapped_share(same_block) == 0.0
    assert overlapped_share([]) == 0.0


def test_chrome_trace_has_a_row_per_stage(trace: list[Interval]) -> None:
    events = chrome_trace(trace)["traceEvents"]
    assert {event["tid"] for event in events} == set(CHAIN)
    assert all(event["ph"] == "X" and event["dur"] > 0 for event in events)
    assert events[0]["name"] == "block 1"


def test_blocks_that_nobody_waits_for_are_not_computed(slow_server: TritonServer, picture: bytes) -> None:
    """The place was free only when all of them had gone through the pipe. Conditioning waits for a sink meanwhile."""
    made, live = series(metrics.BLOCKS, "vae_decoder"), series(metrics.SESSIONS_LIVE)
    with raw_session(slow_server.options.url) as raw:
        raw.ask(BLOCK, picture, start=True)
        for _ in range(40):
            raw.send(BLOCK)
        wait_until(lambda: scrape(slow_server)[metrics.PIPE_BLOCKS.name] >= 6)
        before = scrape(slow_server)[made]
        raw.vanish()
    wait_until(lambda: scrape(slow_server)[live] == 0)
    assert scrape(slow_server)[made] - before < 6
    with raw_session(slow_server.options.url) as raw:
        raw.ask(NOTHING, picture, start=True)
    assert not list((scratch_of(slow_server) / "control").glob("abandoned*"))
