"""The model of the pipe, on schedules that can be worked out by hand, and the model of many nodes against Erlang's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from click.testing import CliRunner

from live_avatar.errors import ConfigError
from perf.figures import BlockTimes, playback, throughput
from perf.predict import main
from perf.scenarios.schedule import PAPER, Case, StageDurations, asked, bounds, calibrated, compared, predicted
from perf.schedule import (
    Client,
    Pipeline,
    StageWork,
    erlang_b,
    load_for,
    refused_share,
    sessions_without_stall,
    simulate,
)
from perf.served import SETTLED, Observed

STEP_S = 0.25


def busiest_s(pipeline: Pipeline) -> float:
    """Least time from block to block in the long run: of the slowest stage, and of the fullest processor."""
    stages = [max(stage.blocks_s[-1], stage.floor_s) for stage in pipeline.stages]
    work: dict[str, float] = {}
    for stage in pipeline.stages:
        work[stage.processor] = work.get(stage.processor, 0.0) + stage.blocks_s[-1]
    work[pipeline.host] = work.get(pipeline.host, 0.0) + pipeline.passing_s
    return max(*stages, *(total / pipeline.capacity.get(name, 1.0) for name, total in work.items()))


def pipe(**options: object) -> Pipeline:
    """Six stages, each alone on its processor; conditioning takes nothing."""
    times = [0.0, STEP_S, STEP_S, STEP_S, STEP_S, 0.1]
    stages = tuple(StageWork(f"s{n}", f"p{n}", (time,)) for n, time in enumerate(times))
    return Pipeline(stages, **options)  # type: ignore[arg-type]


def received(blocks: Sequence[BlockTimes]) -> list[float]:
    return [block.received_s for block in blocks]


def gaps(blocks: Sequence[BlockTimes]) -> list[float]:
    return [after - before for before, after in pairwise(received(blocks))]


def ttff(blocks: Sequence[BlockTimes]) -> float:
    return blocks[0].received_s - blocks[0].begun_s


def test_a_block_passes_all_stages_and_then_one_comes_every_step() -> None:
    session = simulate(pipe(), [Client(blocks=6)]).sessions[0]
    assert ttff(session) == pytest.approx(4 * STEP_S + 0.1)
    assert gaps(session) == pytest.approx([STEP_S] * 5)
    assert throughput(session).steady_fps == pytest.approx(12 / STEP_S)
    assert throughput(session).fps == pytest.approx(6 * 12 / (4 * STEP_S + 0.1 + 5 * STEP_S))


def test_one_block_at_a_time_pays_every_stage() -> None:
    session = simulate(pipe(delivery_s=0.05), [Client(blocks=4, window=1)]).sessions[0]
    assert gaps(session) == pytest.approx([4 * STEP_S + 0.1 + 0.05] * 3)


def test_a_hop_delays_a_block_at_every_stage_and_slows_every_block_once() -> None:
    session = simulate(pipe(hop_s=0.01, delivery_s=0.02, sink_update_block=None), [Client(blocks=6)]).sessions[0]
    start_and_block = 0.01 + 0.01  # the session's start goes before its first block
    assert ttff(session) == pytest.approx(start_and_block + 4 * STEP_S + 0.1 + 5 * 0.01 + 0.02)
    assert gaps(session) == pytest.approx([STEP_S + 0.01] * 5)


@pytest.mark.parametrize(("update", "bubble"), [(2, 3), (3, 2), (4, 1), (5, 0), (None, 0)])
def test_the_pipe_drains_for_an_early_sink(update: int | None, bubble: int) -> None:
    """Block `update` waits until block 1 has left the last step: a bubble of so many steps before its frames."""
    session = simulate(pipe(sink_update_block=update), [Client(blocks=8)]).sessions[0]
    expected = [STEP_S] * 7
    if update is not None:
        expected[update - 2] += bubble * STEP_S
    assert gaps(session) == pytest.approx(expected)


def test_stages_of_one_processor_share_it() -> None:
    """All on one: nothing is gained over one block at a time, however many are under way."""
    together = Pipeline(tuple(StageWork(stage.name, "gpu", stage.blocks_s) for stage in pipe().stages))
    session = simulate(together, [Client(blocks=40)]).sessions[0]
    assert throughput(session).fps == pytest.approx(12 / (4 * STEP_S + 0.1))
    assert busiest_s(together) == pytest.approx(4 * STEP_S + 0.1)
    two_cores = Pipeline(together.stages, capacity={"gpu": 2.0})
    assert busiest_s(two_cores) == pytest.approx((4 * STEP_S + 0.1) / 2)
    doubled = simulate(two_cores, [Client(blocks=40)]).sessions[0]
    assert throughput(doubled).fps == pytest.approx(12 / busiest_s(two_cores), rel=0.03)


def test_what_server_and_client_do_beside_slows_stages_of_their_processor_only() -> None:
    """Of one full core, the work beside is a like part at each of seven hops, and no hop's delay."""
    stages = tuple(StageWork(stage.name, "cpu", stage.blocks_s) for stage in pipe().stages)
    work_s = 4 * STEP_S + 0.1
    for host, block_s in (("cpu", work_s + 0.07), ("elsewhere", work_s)):
        shared = Pipeline(stages, passing_s=0.07, host=host, sink_update_block=None)
        assert busiest_s(shared) == pytest.approx(block_s)
        session = simulate(shared, [Client(blocks=40)]).sessions[0]
        assert throughput(session).fps == pytest.approx(12 / block_s, rel=1e-3)
    alone = simulate(pipe(passing_s=0.07), [Client(blocks=6)]).sessions[0]
    assert gaps(alone) == pytest.approx([STEP_S] * 5)


def test_a_floor_is_waited_for_without_the_processor() -> None:
    """Stages that share one processor, but do little on it, do not slow each other down."""
    stages = tuple(StageWork(f"s{n}", "cpu", (0.01,), floor_s=0.2) for n in range(6))
    session = simulate(Pipeline(stages), [Client(blocks=8)]).sessions[0]
    assert ttff(session) == pytest.approx(6 * 0.2)
    assert gaps(session) == pytest.approx([0.2] * 7)
    assert busiest_s(pipe().with_floor(0.3)) == pytest.approx(0.3)


def test_the_first_blocks_may_take_another_time_and_a_new_avatar_its_own() -> None:
    stages = (
        StageWork("conditioning", "a", (0.0,), open_s=1.0),
        StageWork("step", "b", (0.1, 0.2, 0.3)),
        StageWork("decoder", "c", (0.0,)),
    )
    new, known = (simulate(Pipeline(stages), [Client(blocks=4, known=known)]).sessions[0] for known in (False, True))
    assert received(known) == pytest.approx([0.1, 0.3, 0.6, 0.9])
    assert received(new) == pytest.approx([1.0 + at for at in received(known)])


def test_speech_in_real_time() -> None:
    """A block is served when it is spoken; the player never waits while the pipe keeps up."""
    pace = pipe().block_s
    session = simulate(pipe(), [Client(blocks=10, start_s=3.0, pace_s=pace)]).sessions[0]
    assert ttff(session) == pytest.approx(pace + 4 * STEP_S + 0.1)
    assert [block.received_s - block.complete_s for block in session] == pytest.approx([4 * STEP_S + 0.1] * 10)
    assert playback(session, buffer_s=1e-6).stalls == 0
    slow = Pipeline(tuple(StageWork(s.name, s.processor, (pace * 1.1,)) for s in pipe().stages))
    assert playback(simulate(slow, [Client(blocks=10, pace_s=pace)]).sessions[0], buffer_s=1e-6).stalls == 9


def test_sessions_are_served_in_turns_and_counted() -> None:
    """0.48 s of video in 0.25 s: one session only; in 0.2 s: two; with a decoder as slow as two steps: one again."""
    assert sessions_without_stall(pipe(), most=4) == 1
    faster = Pipeline(tuple(StageWork(s.name, s.processor, (0.2,)) for s in pipe().stages))
    assert sessions_without_stall(faster, most=4) == 2
    shared = [StageWork(s.name, "same" if n > 3 else s.processor, (0.2,)) for n, s in enumerate(faster.stages)]
    assert sessions_without_stall(Pipeline(tuple(shared)), most=4) == 1
    assert sessions_without_stall(pipe().with_floor(0.5), most=4) == 0
    run = simulate(pipe(), [Client(blocks=3), Client(blocks=3)])
    assert [len(session) for session in run.sessions] == [3, 3]
    for name in {interval.stage for interval in run.intervals}:
        busy = sorted((i.start_s, i.end_s) for i in run.intervals if i.stage == name)
        assert all(first[1] <= second[0] + 1e-9 for first, second in pairwise(busy)), name


def test_a_pipe_needs_its_three_kinds_of_stages() -> None:
    with pytest.raises(ConfigError, match="a pipe of 2 stages; give conditioning, at least one step, and the decoder"):
        Pipeline(pipe().stages[:2])


def test_erlang_b_of_known_cases() -> None:
    assert erlang_b(1, 1.0) == pytest.approx(0.5)
    assert erlang_b(2, 1.0) == pytest.approx(1 / 5)
    direct = (5.0**10 / math.factorial(10)) / sum(5.0**k / math.factorial(k) for k in range(11))
    assert erlang_b(10, 5.0) == pytest.approx(direct)
    assert erlang_b(64, load_for(64, 0.01)) == pytest.approx(0.01)


@pytest.mark.parametrize("informed", [True, False])
def test_simulated_refusals_are_erlangs(informed: bool) -> None:
    """Informed, all places are as one group; at random, each node is a group of its own with its part of the load."""
    nodes, slots, load = 4, 2, 5.0
    expected = erlang_b(nodes * slots, load) if informed else erlang_b(slots, load / nodes)
    share = refused_share(nodes, slots, load, sessions=40_000, seed=1, informed=informed)
    assert share == pytest.approx(expected, rel=0.1)


# ---- The scenario


def test_the_model_finds_itself_again_in_what_one_block_at_a_time_shows() -> None:
    """Stages whose first blocks differ, on two cores, with hops: eight blocks under way come out the same."""
    ramp = (0.01, 0.02, 0.03, 0.04, 0.08, 0.04)
    works = {"conditioning": (0.005,), **{f"dit_step_{n}": ramp for n in range(1, 5)}, "vae_decoder": (0.1,)}
    real = Pipeline(
        tuple(StageWork(name, "cpu", times) for name, times in works.items()),
        {"cpu": 2.0},
        hop_s=0.002,
        delivery_s=0.003,
        passing_s=0.007,
    )
    run = simulate(real, [Client(SETTLED + 4, window=1)])
    cpu_s = sum(i.end_s - i.start_s for i in run.intervals if i.block > 0) + (SETTLED + 3) * real.passing_s
    found = calibrated([Observed(list(run.sessions[0]), list(run.intervals), cpu_s)], cores=2.0)
    assert (found.hop_s, found.delivery_s, found.passing_s) == pytest.approx((0.002, 0.003, 0.007))
    for case in (Case("", 0.0, 8), Case("", 0.2, 8, sessions=2)):
        assert predicted(found, case, 20) == pytest.approx(predicted(real, case, 20))


def test_errors_are_of_the_measured_value() -> None:
    row = compared({"fps": 22.0, "ttff_s": 0.9}, {"fps": 20.0, "ttff_s": 1.0})
    assert row["error"] == pytest.approx({"fps": 0.1, "ttff_s": -0.1})


def test_a_stage_runs_its_steps_one_after_another_on_its_gpu() -> None:
    given = StageDurations("", "", conditioning_s=0.01, step_s=0.2, prefill_s=0.1, decoder_s=0.3)
    stages = given.pipeline("gpux2").stages
    assert [(stage.processor, stage.blocks_s, stage.prefill_s) for stage in stages] == [
        ("gpu1", (0.01,), 0.0),
        ("gpu0", (0.4,), 0.1),
        ("gpu1", (0.4,), 0.1),
        ("gpu1", (0.3,), 0.0),
    ]
    assert asked(given, "gpux2")["steady_fps"] == pytest.approx(12 / (0.01 + 0.4 + 0.3), rel=0.01)
    with pytest.raises(ConfigError, match="there is no profile 'h900'; choose one of cpu, cpu-3-steps, gpux1"):
        asked(given, "h900")


def test_the_papers_figures_come_out_of_its_own_times() -> None:
    figures = asked(PAPER, "gpux5")
    assert figures["steady_fps"] == pytest.approx(45.0)
    assert figures["ttff_speech_at_hand_s"] == pytest.approx(1.21)
    assert figures["ttff_s"] == pytest.approx(0.48 + 1.21)
    assert figures["real_time_sessions_by_time"] == 1
    assert asked(PAPER, "gpux4")["ttff_speech_at_hand_s"] == pytest.approx(1.21 - 12 / 45)
    in_sequence_s = 4 * 12 / 45 + 1.21 - 4 * 12 / 45
    assert asked(PAPER, "gpux1")["fps"] == pytest.approx(12 / in_sequence_s)


def test_given_times_on_the_command_line() -> None:
    done = CliRunner().invoke(main, ["--step-ms", "200", "--decoder-ms", "100", "--profile", "gpux5"])
    assert done.exit_code == 0, done.output
    lines = {name.strip(): value for name, value in (line.rsplit(maxsplit=1) for line in done.output.splitlines())}
    assert lines["gpus_per_real_time_session.80 GB.bfloat16"] == "2.5"
    assert lines["steady_fps"] == "60"
    assert lines["ttff_s"] == "1.38"
    assert lines["real_time_sessions_by_time"] == "2"
    wrong = CliRunner().invoke(main, ["--step-ms", "200", "--decoder-ms", "100", "--profile", "h900"])
    assert wrong.exit_code == 1
    assert "there is no profile 'h900'; choose one of cpu" in wrong.output


def test_bounds_and_half_of_them() -> None:
    stage = {"conditioning": 0.01, "dit_step_1": 0.1, "vae_decoder": 0.03}
    gpus = {"H200": {"source": "given", "bound_s": stage, "prefill_bound_s": 0.06}}
    bound, half = bounds({"figures": {"s2v_14b": {"gpus": gpus}}})
    assert (bound.step_s, bound.prefill_s) == (0.1, 0.06)
    assert (half.name, half.step_s) == ("H200, 50% of it", 0.2)
    assert asked(half, "gpux5")["steady_fps"] < 60 < asked(bound, "gpux5")["steady_fps"] < 120
    assert [stage.prefill_s for stage in bound.pipeline("gpux5").stages] == [0, 0.06, 0.06, 0.06, 0.06, 0]


PREFILL_S = 0.07


def prefilling(update: int) -> Pipeline:
    """Steps of 0.1 s, so that block 1 leaves the last one 0.4 s after it was spoken; the decoder takes 0.05 s."""
    steps = tuple(StageWork(f"step{n}", f"gpu{n}", (0.1,), prefill_s=PREFILL_S) for n in range(4))
    ends = (StageWork("conditioning", "host", (0.0,)), StageWork("decoder", "gpu4", (0.05,)))
    return Pipeline((ends[0], *steps, ends[1]), sink_update_block=update)


def late_s(pipeline: Pipeline) -> list[float]:
    session = simulate(pipeline, [Client(blocks=6, pace_s=pipeline.block_s)]).sessions[0]
    return [block.received_s - session[0].received_s - n * pipeline.block_s for n, block in enumerate(session)]


def test_a_new_sink_that_comes_with_its_own_block_adds_up_from_step_to_step() -> None:
    """Block 2 is spoken when the sink is just there: four prefills one after another make it late."""
    assert late_s(prefilling(update=2)) == pytest.approx([0, 4 * PREFILL_S, 0, 0, 0, 0])


def test_a_new_sink_that_came_before_is_prefilled_behind_a_block_and_makes_none_late() -> None:
    assert late_s(prefilling(update=3)) == pytest.approx([0] * 6)
    run = simulate(prefilling(update=5), [Client(blocks=6)])
    begins = [interval.start_s for interval in run.intervals if interval.stage == "step0"]
    assert list(np.diff(begins)) == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.1 + PREFILL_S]), "at full speed it comes last"


def test_sessions_by_time_when_sinks_are_prefilled_ahead() -> None:
    figures = asked(StageDurations("", "", 0.0, step_s=0.1, prefill_s=PREFILL_S, decoder_s=0.05), "gpux5")
    assert figures["latest_block_s"] == pytest.approx(0)
    assert figures["real_time_sessions_by_time"] == 4
