"""The soak's own sums: what the oracle looks up and what it makes, slopes, counters, and what counts as wrong."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from live_avatar.arrays import Array
from live_avatar_client.protocol import BLOCK_SAMPLES, FRAMES_PER_BLOCK
from perf.growth import Series, Slope, fit, group, private_mib, slope_after
from perf.soak import FAULTS, Counters, Governor, failures
from perf.soak_endings import ENDINGS
from perf.soak_sessions import WEIGHTS, Ending, FrameOptions, Oracle, Outcome, Results, Utterance, pictures
from tests.support.repository import ROOT

RNG = np.random.default_rng(7)
BLOCKS = 4
SPEECH = RNG.integers(-3000, 3000, (BLOCKS, BLOCK_SAMPLES), dtype=np.int16)
FRAMES = RNG.integers(0, 256, (BLOCKS * FRAMES_PER_BLOCK, 96, 96, 3), dtype=np.uint8)
UTTERANCE = Utterance(b"", "", 0, SPEECH, FRAMES)


def made(utterance: Utterance, blocks: Array) -> Array:
    return np.full((len(blocks) * FRAMES_PER_BLOCK, 1, 1, 3), 9, dtype=np.uint8)


@pytest.mark.parametrize("blocks", [0, 1, BLOCKS])
def test_the_beginning_of_an_utterance_is_in_the_pool(blocks: int) -> None:
    frames = Oracle(made).frames(UTTERANCE, UTTERANCE.speech_of(blocks))
    assert np.array_equal(frames, FRAMES[: blocks * FRAMES_PER_BLOCK])


@pytest.mark.parametrize(
    "heard",
    [SPEECH[1:], SPEECH[[0, 0]], np.concatenate([SPEECH, SPEECH[:1]])],
    ids=["its end", "a block twice", "more than the utterance"],
)
def test_other_speech_is_generated(heard: Array) -> None:
    frames = Oracle(made).frames(UTTERANCE, heard.reshape(-1))
    assert np.array_equal(frames, made(UTTERANCE, heard))


def test_a_part_of_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="7681 samples are no whole blocks of 7680; the last one is not known"):
        Oracle(made).frames(UTTERANCE, SPEECH.reshape(-1)[: BLOCK_SAMPLES + 1])


def test_wrong_and_surplus_frames_are_counted() -> None:
    results = Results()
    right = FrameOptions().of(FRAMES[:3])
    results.compare(Ending.COMPLETED, 12, right, right)
    assert (results.frames, results.wrong_frames, results.findings) == (3, 0, [])
    results.compare(Ending.COMPLETED, 12, [right[0], right[0], right[2]], right[:2])
    assert (results.frames, results.wrong_frames) == (6, 2)
    assert results.findings == ["completed: frames 13 to 14, 2 of them wrong"]


def test_frame_options_change_the_frames() -> None:
    plain, labelled, jpeg = (
        form.of(FRAMES[:1])[0] for form in (FrameOptions(), FrameOptions(label="AI"), FrameOptions(90))
    )
    assert plain == FRAMES[0].tobytes() != labelled
    assert len(labelled) == len(plain)
    assert jpeg.startswith(b"\xff\xd8")


def test_avatars_differ() -> None:
    assert len(set(pictures(6))) == 6


def test_the_slope_of_a_line_is_found_within_its_error() -> None:
    times = np.arange(240) * 10.0
    noisy = 50 + 6 * times / 3600 + RNG.standard_normal(len(times))
    slope = fit(times, noisy)
    assert slope.error > 0
    assert abs(slope.mib_per_hour - 6) < 4 * slope.error
    assert slope.exceeds(6 - 4 * slope.error - 4 * slope.error)
    assert not slope.exceeds(6)
    exact = fit([0, 1800, 3600], [1, 2, 3])
    assert (exact.mib_per_hour, exact.error) == (pytest.approx(2), pytest.approx(0, abs=1e-9))


def test_the_error_is_that_of_many_repetitions_also_for_samples_that_resemble_their_neighbours() -> None:
    times = np.arange(240) * 10.0
    found = []
    for _ in range(200):
        walk = np.zeros(len(times))
        for n in range(1, len(times)):
            walk[n] = 0.8 * walk[n - 1] + RNG.standard_normal()
        found.append(fit(times, walk))
    scatter = np.std([slope.mib_per_hour for slope in found])
    assert np.mean([slope.error for slope in found]) == pytest.approx(scatter, rel=0.25)


def test_a_slope_needs_samples_after_the_warm_up() -> None:
    series = Series([10.0 * n for n in range(60)], [100.0 - n if n < 20 else 80.0 for n in range(60)], [1] * 60)
    late = slope_after(series, 200.0)
    assert late is not None
    assert (late.samples, late.mib_per_hour) == (40, pytest.approx(0, abs=1e-9))
    assert slope_after(series, 400.0) is None


def test_counters_go_on_over_a_restart() -> None:
    counters = Counters()
    for value in (3, 5, 0, 2, 2):
        counters.update({"ended": value})
    assert counters.totals["ended"] == 7


def test_the_governor_stops_above_its_share() -> None:
    governor = Governor(1.0)
    begun = governor._last_s
    governor.update(0.0, begun)
    assert governor.wait(0)
    governor.update(25.0, begun + 10)
    assert not governor.wait(0)
    governor.update(20.0, begun + 20)  # a process has gone, and its time with it
    assert governor.wait(0)
    assert governor.used_s == 25.0


def test_processes_are_found_by_their_group() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "print(1, flush=True); input()"], stdin=-1, stdout=-1, start_new_session=True
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()  # it is there now, with all its memory
        (process,) = group([child.pid])
        assert (process.pid, process.zombie, process.stage) == (child.pid, False, False)
        assert (private_mib(child.pid) or 0) > 1
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert [one.zombie for one in group([child.pid])] == [True]
    assert group([child.pid]) == []
    assert private_mib(child.pid) is None


def report(**changes: Any) -> dict[str, Any]:
    return {**dict.fromkeys(FAULTS, 0), "memory": [], **changes}


def memory(slope: Slope | None) -> list[dict[str, Any]]:
    return [{"name": "triton", "slope": None if slope is None else vars(slope)}]


def test_each_fault_is_named() -> None:
    assert failures(report(), 10) == []
    for fault in FAULTS:
        assert failures(report(**{fault: 2}), 10) == [f"2 {fault.replace('_', ' ')}"]


PAGES = """
import mmap, os, sys
from perf.growth import MIB, private_mib
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 16 * MIB, access=mmap.ACCESS_COPY) as pages:
    before = private_mib(os.getpid())
    places = range(0, len(pages), 4096)
    assert all(pages[at] >= 0 for at in places)
    read = private_mib(os.getpid())
    for at in places:
        pages[at] = 1
    print(read - before, private_mib(os.getpid()) - before)
"""


def test_pages_of_a_library_count_only_when_they_are_written() -> None:
    """Read, they are shared or private by what other processes do."""
    library = Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"
    command = [sys.executable, "-c", PAGES, library]  # a process that does nothing else meanwhile
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    read_mib, written_mib = map(float, done.stdout.split())
    assert read_mib < 8
    assert written_mib > 12


def test_growth_counts_beyond_three_errors() -> None:
    assert failures(report(memory=memory(None)), 10) == []
    assert failures(report(memory=memory(Slope(13.0, 1.1, 200))), 10) == []
    (sentence,) = failures(report(memory=memory(Slope(13.5, 1.1, 200))), 10)
    assert sentence == "triton grows by 13.5 +- 1.1 MiB per hour, more than 10"


def test_every_ending_can_come() -> None:
    assert set(ENDINGS) == set(Ending)
    assert set(WEIGHTS) == set(Ending) - {Ending.DRAINED}
    rng = random.Random(1)
    assert set(rng.choices(tuple(WEIGHTS), tuple(WEIGHTS.values()), k=2000)) == set(WEIGHTS)


def test_unanswered_and_unexpected_sessions_are_findings() -> None:
    results = Results()
    for outcome in Outcome:
        results.ended(Ending.SILENT, outcome, outcome.value)
    assert results.findings == ["silent: no answer", "silent: unexpected"]
    assert results.table() == {"silent": {outcome.value: 1 for outcome in Outcome}}
