"""What TensorRT-RTX makes of one component: `python -m perf.compiled FOLDER COMPONENT CAPABILITY --json FILE`.

A process of its own per engine, so that its memory is that of one build. The compiler's log lists the kernels of an
engine with their inputs and outputs; an engine itself cannot be read back without a GPU.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import click
import onnx

from live_avatar.exporter.engines import EngineOptions, compile_graph, require_compiler
from live_avatar.graphs.artifacts import load_artifacts
from live_avatar.graphs.flavours import TENSORRT_RTX

ATTENTION = "_mha"
"""Part of the name of a fused attention's kernel."""
PRODUCTS = ("gemm", "runtime_fusion", "correlation")
"""Types of kernels that are a product of matrices or a convolution, alone or with what stands around it."""
BYTES = {"Float": 4, "Half": 2, "BFloat16": 2, "FP8": 1, "Int64": 8, "Int32": 4, "UInt8": 1, "Bool": 1, "Int8": 1}
KERNEL = re.compile(r"^Name: (?P<name>.+?), LayerType: (?P<kind>\w+), Inputs: (?P<inputs>.*), TacticName: ", re.M)
TENSOR = re.compile(r"Dimensions: \[(?P<shape>[\d,]*)\].*?Datatype: (?P<dtype>\w+)")
PROFILE = re.compile(r"_myl(\d+)_\d+$")
MEMORY = re.compile(r"^(Max Scratch|Total Activation|Total Weights) Memory: (\d+) bytes$", re.M)


@dataclass(frozen=True)
class Kernel:
    """One entry of the compiler's list. moved_bytes: of all its inputs and outputs, weights left out."""

    name: str
    kind: str
    profile: int
    moved_bytes: int

    @property
    def is_attention(self) -> bool:
        return ATTENTION in self.name

    @property
    def is_product(self) -> bool:
        return self.kind in PRODUCTS


def kernels(log: str) -> list[Kernel]:
    """The kernels that a log with detailed verbosity lists."""
    return [_kernel(found) for found in KERNEL.finditer(log)]


def _kernel(found: re.Match[str]) -> Kernel:
    inputs, _, rest = found["inputs"].partition(", Constants: ")
    outputs = rest.partition(", Outputs: ")[2]
    place = PROFILE.search(found["name"])
    return Kernel(found["name"], found["kind"], int(place[1]) if place else 0, _bytes(inputs) + _bytes(outputs))


def _bytes(tensors: str) -> int:
    return sum(
        math.prod(int(size) for size in found["shape"].split(",") if size) * BYTES[found["dtype"]]
        for found in TENSOR.finditer(tensors)
    )


def summary(found: Iterable[Kernel], layers: int) -> dict[str, Any]:
    """Numbers of the first profile's kernels; of the transformer also for each of its layers."""
    first = [kernel for kernel in found if kernel.profile == 0]
    moved = sum(kernel.moved_bytes for kernel in first if not (kernel.is_product or kernel.is_attention))
    figures: dict[str, Any] = {
        "kernels": len(first),
        "by_kind": dict(Counter(kernel.kind for kernel in first)),
        "fused_attentions": sum(kernel.is_attention for kernel in first),
        "moved_by_other_kernels_mib": moved / 2**20,
    }
    return figures | ({"kernels_per_layer": len(first) / layers} if layers else {})


def heard(trt: Any) -> Any:
    """A log that keeps everything, and gives the last errors as ours does."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            self.lines.append(msg)
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(msg.strip())

        def reason(self) -> str:
            return "; ".join(self.errors[-3:])

    return Log()


def measure(folder: Path, component: str, capability: str) -> Mapping[str, Any]:
    """Builds one engine in memory; gives figures as JSON values."""
    artifacts = load_artifacts(folder)
    options = EngineOptions(TENSORRT_RTX, (capability,))
    compiler = require_compiler(options, artifacts.preset, artifacts.manifest["fp8"] is not None)
    log = heard(compiler.library.trt)
    compiler = replace(compiler, library=replace(compiler.library, logger=log))
    model = onnx.load(artifacts.graph_path(component), load_external_data=False)
    attentions = sum(node.op_type == "Attention" for node in model.graph.node)
    start = time.monotonic()
    with TemporaryFile() as plan:
        compile_graph(compiler, artifacts, component, model, plan, False, threading.Event(), detailed=True)
        plan_bytes = plan.tell()
    seconds = time.monotonic() - start
    text = "\n".join(log.lines)
    memory = {kind: int(size) for kind, size in MEMORY.findall(text)}
    figures = summary(kernels(text), artifacts.preset.dit.num_layers if component == "dit" else 0)
    return {
        "seconds": seconds,
        "plan_bytes": plan_bytes,
        "activation_bytes": memory["Total Activation"],
        "attentions": attentions,
        "may_be_decomposed": artifacts.contracts[component].decomposable,
        **figures,
    }


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("component")
@click.argument("capability")
@click.option("--json", "target", type=click.Path(path_type=Path), required=True, help="File for the figures.")
def main(folder: Path, component: str, capability: str, target: Path) -> None:
    """Build one engine and write what the compiler told of it."""
    target.write_text(json.dumps(measure(folder, component, capability)))


if __name__ == "__main__":
    main()
