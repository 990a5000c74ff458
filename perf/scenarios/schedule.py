"""Predicts a pipe's speed from stage times: first checked on this machine, then used for GPUs and for many nodes.

The model gets times of one block at a time (each stage's work, and the hops between stages). It must predict the same
server with eight blocks in flight, with two sessions, and with a floor under every stage's time. For GPUs the stage
times are the paper's, and the bounds of the scenario `roofline`.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from live_avatar.config import S2V_14B, Preset
from live_avatar.graphs.memory import ENCODER, Stage, fitting_sessions, process_memory
from live_avatar.serving.profiles import Profile, load_profile
from perf.figures import BlockTimes, hops, throughput
from perf.report import RESULTS, lines_picture
from perf.scenario import Context, Figures, Scenario, Target, check
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
from perf.served import SETTLED, WINDOW, Observed, observe

FLOOR_S = 0.25
BLOCKS, QUICK_BLOCKS = 30, 10
TOLERANCE = 0.05
CPU = "cpu"

RELEASED = S2V_14B.with_precision("bfloat16")
PROFILES = ("gpux5", "gpux4", "gpux3", "gpux2", "gpux1")
MOST_SESSIONS = 16
NODES = (1, 2, 4, 8, 16, 32, 64)
SLOTS = (1, 2, 4)
REFUSED = 0.01
GPU_MEMORY_GIB = {"80 GB": 79.6, "96 GB": 95.6, "141 GB": 140.4}
"""What drivers show of GPUs with so much memory."""
WAYS = {
    "bfloat16": (False, False),
    "bfloat16, text encoder on the host": (False, True),
    "FP8": (True, False),
    "FP8, text encoder on the host": (True, True),
}
"""Types of the transformer's large linears (FP8 or not), and whether the text encoder's weights stay on the host."""
SIMULATED_SESSIONS, QUICK_SIMULATED_SESSIONS = 100_000, 50_000
CHECKED_NODES = 4
"""With more nodes, refusals come in bursts that are too long for this number of sessions to average."""

ROUTES = {"informed": "to a free node", "uninformed": "to any node"}

PAPER_FPS, PAPER_TTFF_S, PAPER_STEPS, PAPER_BLOCK_FRAMES = 45.0, 1.21, 4, 12


# ---- The model and a real run


@dataclass(frozen=True)
class Case:
    """One real run, and the model's parameters for it."""

    name: str
    floor_s: float
    window: int
    sessions: int = 1
    runs: int = 1
    """The median of the runs counts."""
    checked: tuple[str, ...] = ("fps", "ttff_s")
    """Figures that must be within the tolerance."""


CASES = (
    Case("floor, one block at a time", FLOOR_S, 1),
    Case("floor, one session", FLOOR_S, WINDOW),
    Case("floor, two sessions", FLOOR_S, WINDOW, sessions=2),
    # Triton and the client also use the cores during the first block, which the model does not include.
    Case("real compute, one session", 0.0, WINDOW, runs=3, checked=("fps",)),
)


def calibrated(alone: Sequence[Observed], cores: float) -> Pipeline:
    """The pipe from runs with one block at a time, in which no stage waits for another or shares a core."""
    works: defaultdict[str, defaultdict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for interval in sorted((i for run in alone for i in run.intervals), key=lambda i: (i.block, i.start_s)):
        works[interval.stage][interval.block].append(interval.end_s - interval.start_s)
    stages = tuple(StageWork(name, CPU, _times(found)) for name, found in works.items())
    delivery_s = median(late for run in alone for late in _deliveries(run, stages[-1].name))
    hop_s = median(hop for run in alone for hop in hops(run.intervals))
    return Pipeline(stages, {CPU: cores}, hop_s=hop_s, delivery_s=delivery_s, passing_s=_passing_s(alone), host=CPU)


def _passing_s(alone: Sequence[Observed]) -> float:
    """CPU time per block outside the stages' work: of Triton, the client, and the stages between blocks."""
    beside_s = sum(run.cpu_s - _busy_s(run) for run in alone)
    return max(0.0, beside_s / sum(len(run.blocks) - 1 for run in alone))


def _busy_s(run: Observed) -> float:
    """Busy time of the stages on all blocks but the first."""
    return sum(interval.end_s - interval.start_s for interval in run.intervals if interval.block > 0)


def _times(found: Mapping[int, Sequence[float]]) -> tuple[float, ...]:
    """Times by block: the first blocks have less history, and one brings the new sink; the others are alike."""
    first = [median(found[block]) for block in range(SETTLED)]
    return (*first, median(seconds for block, times in found.items() if block >= SETTLED for seconds in times))


def _deliveries(run: Observed, last: str) -> Iterable[float]:
    ends = {i.block: i.end_s for i in run.intervals if i.stage == last}
    return (block.received_s - ends[number] for number, block in enumerate(run.blocks))


def predicted(pipeline: Pipeline, case: Case, blocks: int) -> Figures:
    slowed = pipeline.with_floor(case.floor_s)
    run = simulate(slowed, [Client(blocks, window=case.window) for _ in range(case.sessions)])
    return _seen(run.sessions)


def measured(target: Target, case: Case, blocks: int) -> Figures:
    runs = [_measured(target, case, blocks) for _ in range(case.runs)]
    return {name: median(run[name] for run in runs) for name in runs[0]}


def _measured(target: Target, case: Case, blocks: int) -> Figures:
    with ThreadPoolExecutor(case.sessions) as pool:
        runs = pool.map(lambda _: observe(target, blocks, window=case.window).blocks, range(case.sessions))
        return _seen(list(runs))


def _seen(sessions: Sequence[Sequence[BlockTimes]]) -> Figures:
    """FPS of all sessions together; TTFF of the first session, with recorded speech."""
    return {
        "fps": throughput([block for session in sessions for block in session]).fps,
        "ttff_s": min(session[0].received_s - session[0].sent_s for session in sessions),
    }


def against_a_real_run(context: Context) -> Figures:
    blocks = QUICK_BLOCKS if context.quick else BLOCKS
    by_floor: defaultdict[float, list[Case]] = defaultdict(list)
    for case in CASES:
        by_floor[case.floor_s].append(case)
    real: dict[str, Figures] = {}
    alone: list[Observed] = []
    for floor_s, cases in by_floor.items():
        with context.server(stage_floor_s=floor_s) as target:
            observe(target, SETTLED)
            if not floor_s:
                alone.append(observe(target, blocks, window=1))
            real |= {case.name: measured(target, case, blocks) for case in cases}
            if not floor_s:  # measured again, because a machine's speed drifts
                alone.append(observe(target, blocks, window=1))
    pipeline = calibrated(alone, float(os.cpu_count() or 1))
    rows = {case.name: compared(predicted(pipeline, case, blocks), real[case.name]) for case in CASES}
    return {"blocks": blocks, "calibration": described(pipeline), "runs": rows}


def compared(model: Figures, real: Figures) -> Figures:
    errors = {name: model[name] / real[name] - 1 for name in real}
    return {"predicted": model, "measured": real, "error": errors}


def described(pipeline: Pipeline) -> Figures:
    return {
        "work_s": {stage.name: stage.blocks_s[-1] for stage in pipeline.stages},
        "processors": sorted({stage.processor for stage in pipeline.stages}),
        "capacity": dict(pipeline.capacity),
        "hop_s": pipeline.hop_s,
        "delivery_s": pipeline.delivery_s,
        "passing_s": pipeline.passing_s,
    }


# ---- GPUs, with stage times from elsewhere


@dataclass(frozen=True)
class StageDurations:
    """Stage times that were not measured here, and their source."""

    name: str
    source: str
    conditioning_s: float
    step_s: float
    prefill_s: float
    decoder_s: float

    def slower(self, share: float) -> StageDurations:
        """Stage times of kernels that reach that share of the bounds."""
        names = ("conditioning_s", "step_s", "prefill_s", "decoder_s")
        times = {name: getattr(self, name) / share for name in names}
        return replace(self, name=f"{self.name}, {share:.0%} of it", **times)

    def pipeline(self, profile: str) -> Pipeline:
        """The profile's pipe, with each stage on its processor. A stage runs its steps one after another, and prefills
        a sink once for all of them."""
        works = {"conditioning": (self.conditioning_s,), "vae_decoder": (self.decoder_s,)}
        return Pipeline(
            tuple(
                StageWork(place.name, place.processor, works[place.name])
                if place.steps is None
                else StageWork(place.name, place.processor, (len(place.steps) * self.step_s,), prefill_s=self.prefill_s)
                for place in load_profile(profile).chain
            )
        )


PAPER = StageDurations(
    "the paper's five H800",
    f"arXiv 2512.04677, v4: {PAPER_FPS:g} FPS give the step, {PAPER_TTFF_S} s TTFF less four steps the decoder; of "
    "conditioning and prefill it says nothing, so they are 0 here",
    conditioning_s=0.0,
    step_s=PAPER_BLOCK_FRAMES / PAPER_FPS,
    prefill_s=0.0,
    decoder_s=PAPER_TTFF_S - PAPER_STEPS * PAPER_BLOCK_FRAMES / PAPER_FPS,
)


def bounds(document: Mapping[str, Any]) -> Iterable[StageDurations]:
    """Bounds of the scenario `roofline` for GPUs, and half that speed, which good kernels reach."""
    for gpu, found in document["figures"]["s2v_14b"]["gpus"].items():
        stage = found["bound_s"]
        bound = StageDurations(
            gpu,
            f"bounds of perf/results/roofline.json: {found['source']}",
            stage["conditioning"],
            stage["dit_step_1"],
            found["prefill_bound_s"],
            stage["vae_decoder"],
        )
        yield bound
        yield bound.slower(0.5)


def asked(given: StageDurations, profile: str) -> Figures:
    """Recorded speech for FPS; real-time speech for TTFF and sessions, with a known avatar.

    `latest_block_s` is the largest delay of a block behind a player that began with the first one.
    """
    pipeline = given.pipeline(profile)
    fast = simulate(pipeline, [Client(60)]).sessions[0]
    spoken = simulate(pipeline, [Client(12, pace_s=pipeline.block_s)]).sessions[0]
    late_s = [block.received_s - spoken[0].received_s - n * pipeline.block_s for n, block in enumerate(spoken)]
    chosen = load_profile(profile)
    by_time = sessions_without_stall(pipeline, MOST_SESSIONS)
    by_memory = {name: sessions_by_memory(chosen, gib) for name, gib in GPU_MEMORY_GIB.items()}
    return {
        "gpus": len(chosen.gpus),
        "fps": throughput(fast).fps,
        "steady_fps": throughput(fast).steady_fps,
        "ttff_speech_at_hand_s": fast[0].received_s,
        "ttff_s": spoken[0].received_s,
        "latest_block_s": max(late_s),
        "real_time_sessions_by_time": by_time,
        "sessions_by_memory": by_memory,
        "gpus_per_real_time_session": {
            name: {way: _per_session(len(chosen.gpus), min(by_time, fits)) for way, fits in ways.items()}
            for name, ways in by_memory.items()
        },
        "sessions_by_the_profile": chosen.max_sessions,
    }


def _per_session(gpus: int, sessions: int) -> float | None:
    return gpus / sessions if sessions else None


def sessions_by_memory(profile: Profile, gpu_memory_gib: float, preset: Preset = RELEASED) -> Figures:
    """Sessions of a preset for which every GPU of a profile has room, with the avatars that it remembers."""
    stages: list[tuple[int | None, Stage]] = [(place.gpu, place.memory_stage) for place in profile.chain]
    stages.append((profile.encoder_gpu, ENCODER))

    def fitting(fp8: bool, text_on_host: bool) -> int:
        on_gpus = (
            [process_memory(preset, stage, fp8, text_on_host) for gpu, stage in stages if gpu == number]
            for number in profile.gpus
        )
        return min((fitting_sessions(one, gpu_memory_gib, profile.known_avatars) for one in on_gpus), default=0)

    return {name: fitting(*way) for name, way in WAYS.items()}


def on_gpus() -> Figures:
    path = RESULTS / "roofline.json"
    document = json.loads(path.read_text()) if path.is_file() else {"figures": {}}
    found = list(bounds(document)) if "s2v_14b" in document["figures"] else []
    return {
        given.name: {"source": given.source, "profiles": {profile: asked(given, profile) for profile in PROFILES}}
        for given in (PAPER, *found)
    }


# ---- Many nodes


def on_nodes(sessions: int, seed: int) -> Figures:
    """The mean number of live sessions at which 1 in 100 is refused, and the refused share in a simulation.

    A session runs on one node, so its FPS and TTFF do not depend on the number of nodes.
    """
    return {
        f"{slots} per node": {str(nodes): _group(nodes, slots, sessions, seed) for nodes in NODES} for slots in SLOTS
    }


def _group(nodes: int, slots: int, sessions: int, seed: int) -> Figures:
    together, apart = load_for(nodes * slots, REFUSED), nodes * load_for(slots, REFUSED)
    return {
        "informed_erlangs": together,
        "informed_refused": refused_share(nodes, slots, together, sessions, seed, informed=True),
        "uninformed_erlangs": apart,
        "uninformed_refused": refused_share(nodes, slots, apart, sessions, seed, informed=False),
        "uninformed_refused_at_informed_erlangs": erlang_b(slots, together / nodes),
    }


def measure(context: Context) -> Figures:
    real = against_a_real_run(context)
    nodes = on_nodes(QUICK_SIMULATED_SESSIONS if context.quick else SIMULATED_SESSIONS, context.seed)
    title = "Average sessions at once for 1 refusal in 100"
    shown = [*(("informed", slots) for slots in SLOTS), ("uninformed", SLOTS[-1])]
    series = {
        f"{ROUTES[route]}, {slots} per node": (
            NODES,
            [nodes[f"{slots} per node"][str(n)][f"{route}_erlangs"] for n in NODES],
        )
        for route, slots in shown
    }
    lines_picture(context.picture("schedule"), title, "nodes", "sessions", series)
    return {
        "against_a_real_run": real,
        "on_gpus": on_gpus(),
        "on_nodes": {"refused": REFUSED, **nodes},
        "checks": list(_checks(real["runs"], nodes)),
    }


def _checks(runs: Mapping[str, Figures], nodes: Mapping[str, Figures]) -> Iterable[Figures]:
    for name, run in runs.items():
        for figure in next(case.checked for case in CASES if case.name == name):
            yield check(f"error of {figure}, {name}", abs(run["error"][figure]), at_most=TOLERANCE)
    small = [group for sized in nodes.values() for count, group in sized.items() if int(count) <= CHECKED_NODES]
    farthest = max(abs(group[f"{who}_refused"] / REFUSED - 1) for group in small for who in ROUTES)
    yield check(f"refusals simulated by Erlang's, up to {CHECKED_NODES} nodes, farthest off", farthest, at_most=0.25)


SCENARIO = Scenario("schedule", "what the pipe will do, from stage times: here, on GPUs, on many nodes", measure)
