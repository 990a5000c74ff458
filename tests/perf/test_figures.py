"""Every figure on traces made by hand, whose figures can be worked out in the head."""

from __future__ import annotations

import pytest

from live_avatar.serving.trace import Interval
from perf.figures import (
    BlockTimes,
    first_frame,
    hops,
    latency,
    passing,
    per_session,
    pipeline_efficiency,
    playback,
    real_time_sessions,
    rounded,
    slowest,
    stage_times,
    summary_of,
    throughput,
)


def block(begun: float, complete: float, received: float, frames: int = 12) -> BlockTimes:
    return BlockTimes(frames, begun, complete, complete, received)


IN_TIME = [block(0.48 * n, 0.48 * (n + 1), 0.48 * (n + 1) + 0.1) for n in range(5)]


def pipe(period: float = 1.0, hop: float = 0.0) -> list[Interval]:
    """Three stages of 1.0, 0.5 and 0.25 s; five blocks, one every `period` seconds."""
    found = []
    for number in range(5):
        at = number * period
        for stage, seconds in (("a", 1.0), ("b", 0.5), ("c", 0.25)):
            found.append(Interval(stage, 7, number, at, at + seconds))
            at += seconds + hop
    return found


def test_throughput_counts_from_the_first_block_sent() -> None:
    seen = throughput(IN_TIME)
    assert seen.frames == 60
    assert seen.fps == pytest.approx(60 / (4 * 0.48 + 0.1))
    assert seen.steady_fps == pytest.approx(25)


def test_throughput_of_one_block_has_no_steady_state() -> None:
    assert throughput(IN_TIME[:1]).steady_fps is None


def test_throughput_of_sessions_together() -> None:
    other = [block(b.begun_s + 0.2, b.complete_s + 0.2, b.received_s + 0.2) for b in IN_TIME]
    assert throughput([*IN_TIME, *other]).fps == pytest.approx(120 / (4 * 0.48 + 0.3))


def test_first_frame_has_its_three_parts_and_the_rest() -> None:
    found = first_frame(block(0.0, 0.48, 2.48), [*pipe(), Interval("a", 7, 1, 9.0, 99.0)])
    assert found.ttff_s == pytest.approx(2.48)
    assert found.block_wait_s == pytest.approx(0.48)
    assert found.denoising_s == pytest.approx(1.5)
    assert found.decoding_s == pytest.approx(0.25)
    assert found.rest_s == pytest.approx(0.25)
    assert found.over_parts == pytest.approx(2.48 / 2.23)


def test_latency_leaves_the_start_out() -> None:
    late = [block(0.0, 0.48, 3.0), *(block(0.0, 0.48, 0.48 + n / 1000) for n in range(1, 101))]
    seen = latency(late)
    assert seen.blocks == 100
    assert seen.p50_s == pytest.approx(0.0505)
    assert seen.p95_s == pytest.approx(0.09505)
    assert seen.p99_s == pytest.approx(0.09901)
    assert seen.longest_s == pytest.approx(0.1)


def test_frames_in_time_never_stall() -> None:
    assert playback(IN_TIME, buffer_s=0.0).stalls == 0


def test_a_late_block_stalls_once_and_moves_what_follows() -> None:
    late = [*IN_TIME[:2], *(block(b.begun_s, b.complete_s, b.received_s + 0.3) for b in IN_TIME[2:])]
    seen = playback(late, buffer_s=0.0)
    assert seen.stalls == 1
    assert seen.stalled_s == pytest.approx(0.3)
    assert seen.longest_gap_s == pytest.approx(0.3)


def test_a_buffer_takes_up_what_is_shorter() -> None:
    late = [*IN_TIME[:2], *(block(b.begun_s, b.complete_s, b.received_s + 0.3) for b in IN_TIME[2:])]
    assert playback(late, buffer_s=0.31).stalls == 0
    assert playback(late, buffer_s=0.1).longest_gap_s == pytest.approx(0.2)


def test_too_slow_a_server_stalls_at_every_block() -> None:
    slow = [block(n, n, 1.0 + n) for n in range(6)]  # 12 frames a second
    assert playback(slow, buffer_s=0.0).stalls == 5


@pytest.mark.parametrize(
    ("stalls", "sessions"), [({1: 0, 2: 0, 4: 3}, 2), ({1: 0, 2: 1, 4: 0}, 1), ({1: 2}, 0), ({1: 0, 2: 0}, 2)]
)
def test_real_time_sessions_end_at_the_first_stall(stalls: dict[int, int], sessions: int) -> None:
    assert real_time_sessions(stalls) == sessions


def test_stage_times_and_the_slowest() -> None:
    stages = stage_times(pipe())
    assert list(stages) == ["a", "b", "c"]
    assert stages["b"].mean_s == pytest.approx(0.5)
    assert stages["a"].busy_share == pytest.approx(5 / 5.75)
    assert slowest(stages) == ("a", pytest.approx(1.0))
    late = stage_times(pipe(), skipped=2)["a"]
    assert late.blocks == 3
    assert late.busy_share == pytest.approx(5 / 5.75), "of all blocks"


def test_efficiency_is_what_the_slowest_stage_allows() -> None:
    assert pipeline_efficiency(12.0, 12, 1.0) == pytest.approx(1.0)
    assert pipeline_efficiency(11.4, 12, 1.0) == pytest.approx(0.95)


def test_hops_are_counted_where_the_next_stage_is_idle() -> None:
    assert hops(pipe(hop=0.01)) == pytest.approx([0.01] * 10)
    waits = [*pipe()[:3], Interval("a", 7, 1, 1.0, 1.2), Interval("b", 7, 1, 1.6, 2.0)]  # b was at work till 1.5
    assert hops(waits) == pytest.approx([0.0, 0.0])


def test_passing_of_one_block_at_a_time() -> None:
    intervals = pipe(period=3.0, hop=0.02)
    blocks = [block(3.0 * n - 0.05, 3.0 * n - 0.05, 3.0 * n + 1.79 + 0.06) for n in range(5)]
    seen = passing(blocks, intervals)
    assert (seen.in_s, seen.hop_s, seen.out_s) == pytest.approx((0.05, 0.02, 0.06))
    assert seen.share == pytest.approx(0.15 / 1.9)


def test_memory_of_one_more_session() -> None:
    assert per_session({1: 110.0, 2: 120.0, 4: 140.0}) == pytest.approx(10.0)


def test_summary() -> None:
    assert summary_of([1.0, 2.0, 3.0]) == {"median_s": 2.0, "p95_s": pytest.approx(2.9), "samples": 3}


def test_figures_become_json_values() -> None:
    seen = rounded({1: throughput(IN_TIME), "list": [(0.123456789, "a")], "none": None})
    assert seen["1"]["frames"] == 60
    assert seen["list"] == [[0.12346, "a"]]
    assert seen["none"] is None
