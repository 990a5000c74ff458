"""An artifacts folder, made whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx_ir.tensor_adapters import TorchTensor
from safetensors.torch import save_file

from live_avatar.config import Preset
from live_avatar.errors import ExportError
from live_avatar.exporter.processes import shared
from live_avatar.exporter.quantization import (
    DYNAMIC,
    QUANTIZED,
    Calibration,
    Scaling,
    quantize_checkpoint,
    quantize_graph,
)
from live_avatar.exporter.replacement import replacing
from live_avatar.exporter.tracing import OPSET, TracedGraph, Tracer
from live_avatar.exporter.weight_file import WeightFile, tensor_bytes
from live_avatar.graphs.artifacts import (
    FORMAT,
    MANIFEST,
    MODULATION,
    TOKENIZER,
    Artifacts,
    load_artifacts,
    weight_file,
)
from live_avatar.graphs.components import build_components
from live_avatar.graphs.contract import contracts
from live_avatar.graphs.digests import file_digests, file_sha256
from live_avatar.json_files import read_json
from live_avatar.model.networks import Networks, meta_networks
from live_avatar.model.schedule import make_schedule
from live_avatar.version import __version__
from live_avatar.weights.checkpoint import modulation_networks
from live_avatar.weights.lora import MergedWeights
from live_avatar.weights.tensors import Checkpoint, Weights

LEAST_BYTES = 1024  # constants smaller than this stay in the graph
Progress = Callable[[str], None]


def export_artifacts(
    checkpoint: Checkpoint,
    output: Path,
    progress: Progress,
    scaling: Scaling | None = None,
    helper: Executor | None = None,
) -> Artifacts:
    """Exports every component of a checkpoint into the folder `output`, replacing artifacts that stand there.

    `progress` is told each component's name before its export; with a helper, which does a part of the work in another
    process, once it is exported. With a scaling the transformer's large linears are in FP8. Each process holds one
    weight at a time in host memory. Raises `ExportError` if `output` exists and is not an artifacts folder or cannot be
    replaced, if another export writes there, or if the calibration is of other graphs, and `CheckpointError` for
    unusable weights.
    """
    _refuse_foreign(output)
    with replacing(output) as folder:
        _write_modulation(checkpoint.preset, modulation_networks(checkpoint), folder / MODULATION)
        _write_graphs(checkpoint, folder, progress, scaling, helper)
        if checkpoint.tokenizer is not None:
            shutil.copyfile(checkpoint.tokenizer, folder / TOKENIZER)
        (folder / MANIFEST).write_text(json.dumps(_manifest(checkpoint, folder, scaling), indent=1))
        _refuse_foreign(output)  # what came there meanwhile
    return load_artifacts(output)


def _refuse_foreign(output: Path) -> None:
    if output.exists() and not _replaceable(output):
        raise ExportError(f"{output} exists and is not an artifacts folder; choose another --output or remove it.")


def _replaceable(output: Path) -> bool:
    """Whether it is an empty folder, or artifacts of any version: a manifest of something else is no licence."""
    if not output.is_dir() or not any(output.iterdir()):
        return output.is_dir()
    try:
        manifest = read_json(output / MANIFEST)
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and {"format", "contracts", "files"} <= manifest.keys()


def _write_modulation(preset: Preset, networks: Networks, path: Path) -> None:
    """Modulation of timestep 0 and of every step, float32."""
    with torch.no_grad():
        made = [networks.dit.modulation(timestep) for timestep in (0.0, *make_schedule(preset.stream).timesteps)]
    tensors = {
        "modulation": torch.stack([value.layers for value in made]),
        "head_modulation": torch.stack([value.head for value in made]),
    }
    save_file(tensors, path)


def _write_graphs(
    checkpoint: Checkpoint, folder: Path, progress: Progress, scaling: Scaling | None, helper: Executor | None
) -> None:
    by_file: dict[str, list[str]] = {}
    for name in contracts(checkpoint.preset):
        by_file.setdefault(weight_file(name), []).append(name)
    write = partial(_write_file, checkpoint, scaling, folder)
    if helper is None:
        for names in by_file.values():
            write(names, progress)
        return
    # The transformer takes longest here, and the VAE is the next; they are the last.
    *others, vae, transformer = by_file.values()
    for names in shared([transformer, *others, vae], helper, write):
        for name in names:
            progress(name)


def _no_progress(component: str) -> None:
    pass


def _write_file(
    checkpoint: Checkpoint,
    scaling: Scaling | None,
    folder: Path,
    names: Sequence[str],
    progress: Progress = _no_progress,
) -> None:
    """Writes the graphs of these components, which share a file of weights, and that file."""
    preset, agreed = checkpoint.preset, contracts(checkpoint.preset)
    components = build_components(preset, meta_networks(preset))
    tracer = Tracer({name: components[name] for name in names})
    if scaling is not None:
        checkpoint = quantize_checkpoint(checkpoint, scaling)
    with WeightFile(folder / weight_file(names[0])) as weights:
        for name in names:
            progress(name)
            graph = tracer.trace(agreed[name])
            if scaling is not None and name in QUANTIZED:
                graph = quantize_graph(graph, name, scaling)
            _place(graph, checkpoint, weights)
            onnx.save(ir.to_proto(graph.model), folder / f"{name}.onnx")
    for name in names:
        onnx.checker.check_model(folder / f"{name}.onnx", full_check=True)


def _place(graph: TracedGraph, checkpoint: Checkpoint, file: WeightFile) -> None:
    """Gives every initializer of the graph its value: a place in the file, unless it is small."""
    named = {value: name for name, value in graph.weights}
    for value in graph.model.graph.initializers.values():
        name = named.get(value)
        if name is not None and name in graph.constants:
            value.const_value = _constant(TorchTensor(graph.constants[name], name=value.name), value, file)
        elif name is not None:
            value.const_value = file.place(name, value, partial(_read, checkpoint, name, value))
        elif not isinstance(value.const_value, ir.ExternalTensor):  # not placed yet; components may share a model
            assert value.const_value is not None
            value.const_value = _constant(value.const_value, value, file)


def _constant(constant: ir.TensorProtocol, value: ir.Value, file: WeightFile) -> ir.TensorProtocol:
    """A constant is known by what it is, since its name may mean another value in another component."""
    if constant.nbytes < LEAST_BYTES:
        return constant
    data = constant.tobytes()
    return file.place(hashlib.sha256(data).hexdigest(), value, lambda: data)


def _read(checkpoint: Checkpoint, name: str, value: ir.Value) -> memoryview:
    """A weight in the type of the graph, as bytes; parameters are called `part.name in the state dict`."""
    part, _, official = name.partition(".")
    assert value.dtype is not None
    return tensor_bytes(checkpoint.parts[part].read(official).to(getattr(torch, str(value.dtype.numpy()))))


def provenance(weights: Weights) -> dict[str, Any]:
    """What a network's weights are: the files by name, and how much of an adapter; or the seed they are drawn from."""
    if not weights.files:
        return {"origin": weights.origin}
    lora = {"lora_scale": weights.scale} if isinstance(weights, MergedWeights) else {}
    return {"files": {path.name: file_sha256(path) for path in weights.files}, **lora}


def _described(scaling: Scaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    return {"calibrated_on_blocks": scaling.blocks} if isinstance(scaling, Calibration) else {"scaling": DYNAMIC}


def _manifest(checkpoint: Checkpoint, folder: Path, scaling: Scaling | None) -> dict[str, Any]:
    preset = checkpoint.preset
    digests = file_digests(sorted(folder.iterdir()))
    return {
        "format": FORMAT,
        "version": __version__,
        "preset": preset.to_dict(),
        "weights": {part: provenance(weights) for part, weights in checkpoint.parts.items()},
        "opset": OPSET,
        "fp8": _described(scaling),
        "made_with": {
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
        "contracts": {name: contract.to_dict() for name, contract in contracts(preset).items()},
        "files": {path.name: {"bytes": path.stat().st_size, "digest": digest} for path, digest in digests.items()},
    }
