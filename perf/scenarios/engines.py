"""What NVIDIA's compiler makes of every graph, without a GPU: time, size, memory, and which kernels.

TensorRT-RTX compiles `tiny` in three precisions, and cuts of the released model (its widths and picture, random
weights): two layers of everything, and a transformer of eight layers for the memory of a build. Each engine is built in
a process of its own (`perf.compiled`). Nothing is run: kernels and bytes are those that the compiler lists.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.synthetic import made_up_calibration, official_preset, write_checkpoint
from live_avatar.config import S2V_14B, TINY
from live_avatar.exporter.build import export_artifacts
from live_avatar.exporter.quantization import QUANTIZED
from live_avatar.graphs.artifacts import load_artifacts
from live_avatar.graphs.contract import DIT
from live_avatar.weights.checkpoint import open_checkpoint
from perf.export_memory import peak_bytes
from perf.report import BLUE, axes, save
from perf.scenario import Context, Figures, Scenario, check

CUT = {"layers": 2, "text-layers": 1, "text-vocab": 1024, "speech-layers": 2}
DEEP = {**CUT, "layers": 8}
"""Its transformer has 5.6 GiB of weights, so that what a build holds beside them hardly counts."""
DEEP_NAME = "8 layers of the released model, bfloat16"
MOST_OF_WEIGHTS = 2.0
"""Own memory of a build at its peak, by the size of the engine: a node must build what it serves."""
QUICK = ("audio_tokens", "dit_block_tokens")


@dataclass(frozen=True)
class Model:
    """Artifacts to compile: a name, the folder, compute capabilities, components (all if empty)."""

    name: str
    folder: Path
    capabilities: Sequence[str]
    components: Sequence[str] = ()


def _models(context: Context, folder: Path) -> list[Model]:
    """Exports what is compiled beside the given artifacts."""
    tiny = load_artifacts(context.artifacts)
    given = f"{tiny.preset.name}, {tiny.preset.precision}"
    if context.quick:
        return [Model(given, context.artifacts, ("8.9",), QUICK)]
    sixteen = TINY.with_precision("bfloat16")
    context.log("exporting tiny in bfloat16 and in FP8")
    export_artifacts(open_checkpoint(sixteen), folder / "bfloat16", lambda name: None)
    export_artifacts(open_checkpoint(sixteen), folder / "fp8", lambda name: None, made_up_calibration(sixteen))
    for name, sizes in (("cut", CUT), ("deep", DEEP)):
        context.log(f"writing and exporting {sizes['layers']} layers of the released model")
        _export_cut(sizes, folder / name)
    return [
        Model(given, context.artifacts, ("8.9",)),
        Model("tiny, bfloat16", folder / "bfloat16", ("8.9",)),
        Model("tiny, FP8", folder / "fp8", ("8.9",), QUANTIZED),
        Model("2 layers of the released model, bfloat16", folder / "cut", ("8.0", "8.9", "12.0")),
        Model(DEEP_NAME, folder / "deep", ("8.9",), (DIT,)),
    ]


def _export_cut(sizes: Mapping[str, int], folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        weights = Path(temporary) / "weights"
        write_checkpoint(official_preset(S2V_14B, sizes), weights, seed=0)
        preset = open_checkpoint(None, weights).preset.with_precision("bfloat16")
        export_artifacts(open_checkpoint(preset, weights), folder, lambda name: None)


def measure(context: Context) -> Figures:
    with tempfile.TemporaryDirectory(prefix="live-avatar-engines-") as folder:
        models = {model.name: _compiled(context, model) for model in _models(context, Path(folder))}
    _picture(context, models)
    return {"models": models, "checks": list(_checks(models))}


def _compiled(context: Context, model: Model) -> Figures:
    """By compute capability and component."""
    artifacts = load_artifacts(model.folder)
    return {
        capability: {
            component: _built(context, model, component, capability)
            for component in model.components or artifacts.contracts
        }
        for capability in model.capabilities
    }


def _built(context: Context, model: Model, component: str, capability: str) -> Figures:
    context.log(f"{model.name}: {component} for {capability}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "perf.compiled", str(model.folder), component, capability, "--json", str(path)]
        code, peak = peak_bytes(command)
        if code:
            raise RuntimeError(f"{' '.join(command)} ended with code {code}; what it said stands above.")
        return {**json.loads(path.read_text()), "peak_own_bytes": peak["RssAnon"]}


def _checks(models: Mapping[str, Any]) -> list[Figures]:
    """Every attention is one kernel unless the contract has a reason why it need not be; a build needs no node of twice
    the engine's size."""
    memory = [
        check(
            f"own memory of the build of {component}, {capability}, by the size of the engine",
            one["peak_own_bytes"] / one["plan_bytes"],
            at_most=MOST_OF_WEIGHTS,
        )
        for capability, components in models.get(DEEP_NAME, {}).items()
        for component, one in components.items()
    ]
    return memory + [
        check(
            f"fused attentions of {component}, {name}, {capability}, against {one['attentions']}",
            one["fused_attentions"],
            at_least=one["attentions"],
        )
        for name, capabilities in models.items()
        for capability, components in capabilities.items()
        for component, one in components.items()
        if not one["may_be_decomposed"]
    ]


def _picture(context: Context, models: Mapping[str, Any]) -> None:
    """Seconds of every build for the last compute capability of each model."""
    shown = {
        f"{component} ({name})": one["seconds"]
        for name, capabilities in models.items()
        for component, one in list(capabilities.values())[-1].items()
    }
    plot = axes("Time to compile an engine", "seconds", "", height=0.6 + 0.22 * len(shown))
    plot.barh(list(shown)[::-1], list(shown.values())[::-1], color=BLUE)
    save(plot, context.picture("engines"))


SCENARIO = Scenario(
    "engines",
    "what NVIDIA's compiler makes of every graph: time, size, memory and kernels, without a GPU",
    measure,
    ("tensorrt-rtx-cu12", "onnx"),
)
