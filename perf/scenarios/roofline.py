"""The speed of each stage as a share of this machine's peak, and bounds of the released model on given GPUs.

This machine's peak rates are measured on one thread, as the CPU's runtime uses one. The rates of GPUs are the maker's;
no kernel reaches them, so the results for GPUs are bounds and not predictions.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import onnx.parser
import torch

from live_avatar.arrays import Array
from live_avatar.config import S2V_14B, Preset
from live_avatar.exporter.tracing import OPSET, random_inputs
from live_avatar.graphs.artifacts import Artifacts, load_artifacts
from live_avatar.graphs.contract import Extent
from live_avatar.runtime.onnx_runtime import OnnxGraph, OnnxRuntime
from live_avatar_client.protocol import FPS
from perf.preset_cost import PREFILL, artifacts_costs, preset_costs, stage_components
from perf.report import BLUE, GREEN, axes, save
from perf.roofline import Ceilings, Cost
from perf.scenario import Context, Figures, Scenario, check
from perf.steps import one_thread

RUNS, QUICK_RUNS = 15, 3
MATMUL_SIZES = (512, 1024, 2048)
COPY_BYTES = 2**28
PAPER_FPS = 45.0
"""FPS on five H800 from the abstract of arXiv 2512.04677, v4 (at 720x400; the preset has 704x384)."""

DATA_SHEET = "NVIDIA's data sheet of the {} SXM, dense; not measured"
BF16, FP8 = 989e12, 1979e12
GPUS = (
    Ceilings("H800, bfloat16", BF16, 3.35e12, DATA_SHEET.format("H800")),
    Ceilings("H800, FP8 in MatMul", BF16, 3.35e12, DATA_SHEET.format("H800"), {"MatMul": FP8}),
    Ceilings("H200, bfloat16", BF16, 4.8e12, DATA_SHEET.format("H200")),
    Ceilings("H200, FP8 in MatMul", BF16, 4.8e12, DATA_SHEET.format("H200"), {"MatMul": FP8}),
)


def measure(context: Context) -> Figures:
    artifacts = load_artifacts(context.artifacts)
    runs = QUICK_RUNS if context.quick else RUNS
    machine = this_machine(runs)
    costs = artifacts_costs(artifacts)
    seconds = graph_seconds(artifacts, runs)
    stages = {
        stage: reached(machine, stage_cost(costs, parts), sum(seconds[part] for part in parts))
        for stage, parts in stage_components(artifacts.preset).items()
    }
    picture(machine, stages, context.picture("roofline"))
    highest = max(stage["share_of_bound"] for stage in stages.values())
    figures: Figures = {
        "ceilings": {"flops_per_s": machine.flops_per_s, "bytes_per_s": machine.bytes_per_s, "source": machine.source},
        "stages": stages,
        "components": {name: _counted(cost) for name, cost in costs.items()},
        "checks": [check("nearest to a bound", highest, at_most=1.05)],
    }
    return figures if context.quick else figures | {"s2v_14b": of_gpus(S2V_14B.with_precision("bfloat16"))}


def stage_cost(costs: Mapping[str, Cost], parts: tuple[str, ...]) -> Cost:
    return Cost.combined(*((1, costs[part]) for part in parts))


def reached(machine: Ceilings, cost: Cost, seconds: float) -> Figures:
    """Time of a stage and its bound."""
    return _counted(cost) | {
        "measured_s": seconds,
        "bound_s": machine.bound_s(cost),
        "limited_by": machine.limited_by(cost),
        "flops_per_s": cost.flops / seconds,
        "share_of_bound": machine.bound_s(cost) / seconds,
    }


def of_gpus(preset: Preset) -> Figures:
    """Bounds of a preset's stages on the given GPUs: one stage on each, and conditioning with the decoder."""
    costs = preset_costs(preset)
    stages = {name: stage_cost(costs, parts) for name, parts in stage_components(preset).items()}
    return {
        "preset": preset.name,
        "picture": [preset.stream.width, preset.stream.height],
        "components": {name: _counted(cost) for name, cost in costs.items()},
        "gpus": {gpu.name: _bounds(gpu, stages, stage_cost(costs, PREFILL), preset) for gpu in GPUS},
    }


def _bounds(gpu: Ceilings, stages: Mapping[str, Cost], prefill: Cost, preset: Preset) -> Figures:
    bounds = {name: gpu.bound_s(cost) for name, cost in stages.items()}
    last = bounds["conditioning"] + bounds["vae_decoder"]
    slowest = max(last, *(bound for name, bound in bounds.items() if name.startswith("dit_step")))
    return {
        "source": gpu.source,
        "bound_s": bounds,
        "prefill_bound_s": gpu.bound_s(prefill),
        "limited_by": {name: gpu.limited_by(cost) for name, cost in stages.items()},
        "two_sessions_in_one_call_by_two_calls": {
            name: gpu.bound_s(together(cost)) / (2 * gpu.bound_s(cost))
            for name, cost in stages.items()
            if name.startswith("dit_step")
        },
        "fps_at_most": preset.stream.block_frames / slowest,
        "sessions_at_most": int(preset.stream.block_frames / slowest / FPS),
        "share_of_bound_at_the_papers_fps": slowest * PAPER_FPS / preset.stream.block_frames,
    }


def together(cost: Cost) -> Cost:
    """Two sessions' blocks at one step in one call: everything twice but the weights, which are read once."""
    return replace(Cost.combined((2, cost)), weight_bytes=cost.weight_bytes)


def _counted(cost: Cost) -> Figures:
    return {
        "flops": cost.flops,
        "flops_by_operator": dict(cost.flops_by_operator),
        "least_bytes": cost.least_bytes,
        "weight_bytes": cost.weight_bytes,
        "unfused_bytes": cost.unfused_bytes,
        "flops_per_byte": cost.intensity,
    }


# ---- This machine


def this_machine(runs: int) -> Ceilings:
    """Fastest float32 product of several sizes in two libraries; a copy (read and written) larger than the caches."""
    with one_thread():
        products = [(size, product(size)) for size in MATMUL_SIZES for product in (_torch_product, _onnx_product)]
        flops_per_s = max(2 * size**3 / _fastest(product, runs) for size, product in products)
    source, target = np.ones(COPY_BYTES, np.uint8), np.zeros(COPY_BYTES, np.uint8)
    bytes_per_s = 2 * COPY_BYTES / _fastest(lambda: np.copyto(target, source), runs)
    sizes = ", ".join(map(str, MATMUL_SIZES))
    measured = (
        f"measured on one thread: float32 products of {sizes}, the faster of torch's and ONNX Runtime's; "
        f"numpy's copy of {COPY_BYTES >> 20} MiB"
    )
    return Ceilings("this machine", flops_per_s, bytes_per_s, measured)


def _torch_product(size: int) -> Callable[[], object]:
    left, right = map(torch.from_numpy, _factors(size))
    return lambda: torch.matmul(left, right)


def _onnx_product(size: int) -> Callable[[], object]:
    left, right = _factors(size)
    graph = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : {OPSET}]> '
        f"product (float[{size}, {size}] left, float[{size}, {size}] right) => (float[{size}, {size}] out)"
        "{ out = MatMul(left, right) }"
    )
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(graph, f"{folder}/product.onnx")
        loaded = OnnxGraph(f"{folder}/product.onnx")
    return lambda: loaded.run({"left": left, "right": right})


def _factors(size: int) -> list[Array]:
    generator = np.random.default_rng(0)
    return [generator.random((size, size), dtype=np.float32) for _ in range(2)]


def _fastest(work: Callable[[], object], runs: int) -> float:
    work()
    return min(_seconds(work) for _ in range(runs))


def _seconds(work: Callable[[], object]) -> float:
    begun_s = time.perf_counter()
    work()
    return time.perf_counter() - begun_s


def graph_seconds(artifacts: Artifacts, runs: int) -> dict[str, float]:
    """Median seconds of every component that a stage runs for a block, in this process, with full caches."""
    runtime, seconds = OnnxRuntime(artifacts), {}
    for name in {part for parts in stage_components(artifacts.preset).values() for part in parts}:
        graph, inputs = runtime.graph(name), random_inputs(artifacts.contracts[name], 0, Extent.MAX)
        graph.run(inputs)
        seconds[name] = median(_seconds(lambda: graph.run(inputs)) for _ in range(runs))  # noqa: B023 - run at once
    return seconds


def picture(machine: Ceilings, stages: Mapping[str, Figures], path: Path) -> None:
    """A plot of the roofline with each stage."""
    plot = axes("Stages of the tiny avatar under this machine's roof", "operations per byte", "GFLOP/s", height=3.8)
    intensities = np.geomspace(1, 2000, 100)
    roof = np.minimum(machine.flops_per_s, intensities * machine.bytes_per_s) / 1e9
    plot.loglog(intensities, roof, color=GREEN, label="measured ceilings, one thread")
    plot.set_ylim(machine.flops_per_s / 2e10, machine.flops_per_s / 5e8)
    shown = {name: stage for name, stage in stages.items() if not name.startswith("dit_step") or name.endswith("_1")}
    for name, stage in shown.items():
        at = (stage["flops_per_byte"], stage["flops_per_s"] / 1e9)
        plot.plot(*at, "o", color=BLUE)
        plot.annotate(name, at, xytext=(6, -12), textcoords="offset points")
    plot.legend(frameon=False, loc="lower right")
    save(plot, path)


SCENARIO = Scenario(
    "roofline",
    "operations and bytes of every stage, and how near it comes to the ceilings",
    measure,
    ("onnx", "onnxruntime", "torch"),
)
