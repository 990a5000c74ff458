"""The paper's Table 3 on this system: the gain of the pipe, and the cost of doing without it.

It is measured twice. With real compute all stages share this machine's cores, so the pipe gains little. With a floor
under every stage's time each stage behaves as if it had its own processor; the stage times are set, and the result of
the serving path is measured. Stages that share a processor take turns with a lock (Triton's own rate limiter lost
requests of sequences on 2.51).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from live_avatar.assets import DEMO_PROMPT, PORTRAIT
from live_avatar.graphs.artifacts import load_artifacts
from live_avatar.model.schedule import without_idle_step
from live_avatar.pipeline.generator import Generator
from live_avatar.runtime.onnx_runtime import OnnxRuntime
from perf.figures import BlockTimes, throughput
from perf.load import demo_blocks
from perf.report import BLUE, GREEN, axes, save
from perf.scenario import Context, Figures, Scenario, check
from perf.served import SETTLED, WINDOW, observe
from perf.variants import variant

FLOOR_S = 0.2
BLOCKS, QUICK_BLOCKS = 24, 8
MANY_STEPS, MANY_STEPS_BLOCKS = 80, 6
STEPS = tuple(f"dit_step_{number}" for number in range(1, 5))
TPP, THREE_STEPS, ONE_BLOCK = "TPP", "TPP, 3 steps", "without TPP: one block at a time"
ONE_PROCESSOR, SHARED_DECODER = "without TPP: steps take turns", "VAE on the last step's processor"
FEW_ALONE, MANY_ALONE = "4 evaluations, one process", f"{MANY_STEPS} evaluations, one process"


@dataclass(frozen=True)
class Setup:
    """One served row: its profile, blocks in flight, and the stages that share a processor."""

    name: str
    about: str
    profile: str = "cpu"
    window: int = WINDOW
    share: tuple[str, ...] = ()


SETUPS = (
    Setup(TPP, "every stage on its own; 8 blocks under way"),
    Setup(ONE_BLOCK, "the same server, the next block sent when the last one's frames have come", window=1),
    Setup(ONE_PROCESSOR, "one step at a time, of any block; the decoder on its own", share=STEPS),
    Setup(SHARED_DECODER, "the decoder and step 4 take turns", share=(STEPS[-1], "vae_decoder")),
    Setup(THREE_STEPS, "the schedule without its idle last step, one stage less", profile="cpu-3-steps"),
)


def measure(context: Context) -> Figures:
    three = without_idle_step(load_artifacts(context.artifacts).preset.stream)
    folders = {
        "cpu": context.artifacts,
        "cpu-3-steps": variant(context.artifacts, "3-steps", steps=three.steps, sigmas=three.sigmas).folder,
    }
    compute = served(context, folders, 0.0)
    alone = {row["name"]: row for row in in_one_process(context)}
    floor = served(context, folders, FLOOR_S)
    picture(floor, context.picture("ablation"))
    return {
        "blocks": _blocks(context),
        "stage_floor": {"stage_floor_s": FLOOR_S, "rows": list(floor.values())},
        "real_compute": {"rows": [*compute.values(), *alone.values()]},
        "checks": list(_checks(floor, alone)),
    }


def _blocks(context: Context) -> int:
    return QUICK_BLOCKS if context.quick else BLOCKS


def served(context: Context, folders: Mapping[str, Path], floor_s: float) -> dict[str, Figures]:
    """Every row by its name, each with its ratio to TPP."""
    rows: dict[str, Figures] = {}
    for setup in SETUPS:
        rows[setup.name] = row(setup.name, setup.about, _observed(context, setup, folders[setup.profile], floor_s))
        context.log(f"{setup.name}: {rows[setup.name]['steady_fps']:.1f} FPS")
    return {name: with_ratio(found, rows[TPP]) for name, found in rows.items()}


def _observed(context: Context, setup: Setup, artifacts: Path, floor_s: float) -> Sequence[BlockTimes]:
    with context.server(profile=setup.profile, artifacts=artifacts, stage_floor_s=floor_s, turns=setup.share) as target:
        observe(target, 2 if floor_s else SETTLED)
        return observe(target, _blocks(context), window=setup.window).blocks


def row(name: str, about: str, blocks: Sequence[BlockTimes]) -> Figures:
    """FPS with and without the first block; TTFF with recorded speech, so without the wait for the block boundary."""
    seen = throughput(blocks)
    ttff_s = blocks[0].received_s - blocks[0].sent_s
    return {"name": name, "about": about, "fps": seen.fps, "steady_fps": seen.steady_fps, "ttff_s": ttff_s}


def with_ratio(found: Figures, tpp: Figures) -> Figures:
    return found | {"by_tpp": found["steady_fps"] / tpp["steady_fps"]}


def in_one_process(context: Context) -> Iterator[Figures]:
    """Algorithm 3 on the same graphs. A pipe of 80 stages would need 80 processes, and the paper has none either."""
    many = variant(context.artifacts, f"{MANY_STEPS}-steps", steps=MANY_STEPS, sigmas=None).folder
    few = row(FEW_ALONE, "one network after another", generated(context.artifacts, _blocks(context)))
    blocks = generated(many, 2 if context.quick else MANY_STEPS_BLOCKS)
    for found in (few, row(MANY_ALONE, "the same with as many steps as before distillation", blocks)):
        yield found | {"by_4_evaluations": found["steady_fps"] / few["steady_fps"]}


def generated(artifacts: Path, blocks: int) -> list[BlockTimes]:
    """It does not include the avatar's encoding and prefill, which the generator does before its first block."""
    generator = Generator(OnnxRuntime(load_artifacts(artifacts)))
    speech = iter(demo_blocks(blocks + 1))
    made = generator.stream(PORTRAIT.read_bytes(), DEMO_PROMPT, 0, speech)
    next(made)
    begun_s, seen = time.monotonic(), []
    for block in made:
        seen.append(BlockTimes(len(block.frames), begun_s, begun_s, begun_s, time.monotonic()))
    return seen


def _checks(floor: Mapping[str, Figures], alone: Mapping[str, Figures]) -> Iterator[Figures]:
    """Checks the pipe's purpose: a block costs the time of one stage, not of all."""
    stages = len(STEPS) + 2
    yield check("TPP by one block at a time", 1 / floor[ONE_BLOCK]["by_tpp"], at_least=0.9 * stages)
    yield check("TPP by steps that take turns", 1 / floor[ONE_PROCESSOR]["by_tpp"], at_least=0.9 * len(STEPS))
    yield check("TPP by VAE on the last step's processor", 1 / floor[SHARED_DECODER]["by_tpp"], at_least=0.9 * 2)
    yield check("3 steps by 4, TTFF", floor[THREE_STEPS]["ttff_s"] / floor[TPP]["ttff_s"], at_most=0.95)
    yield check("80 evaluations by 4, FPS", alone[MANY_ALONE]["by_4_evaluations"], at_most=0.5)


def picture(rows: Mapping[str, Figures], path: Path) -> None:
    plot = axes(f"What the pipe gains, every stage slowed down to {FLOOR_S:g} s", "FPS", "")
    names = list(rows)[::-1]
    speeds = [rows[name]["steady_fps"] for name in names]
    bars = plot.barh(names, speeds, color=[GREEN if name.startswith(TPP) else BLUE for name in names])
    labels = [f"{speed:.1f} FPS, TTFF {rows[name]['ttff_s']:.2f} s" for name, speed in zip(names, speeds, strict=True)]
    plot.bar_label(bars, labels, padding=4)
    plot.set_xlim(0, 1.6 * max(speeds))
    save(plot, path)


SCENARIO = Scenario("ablation", "the paper's Table 3: what the pipe gains", measure, ("onnxruntime", "tritonclient"))
