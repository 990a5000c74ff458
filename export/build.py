"""An artifacts folder, made whole or not at all.

Everything is written into a folder beside the target and moved into place at the end, so an interrupted
export leaves no half-made artifacts behind. Knows presets, graphs and files; knows no engine.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import nn

from export.graphs import OPSET, export_graph
from export.weights import SharedWeights
from live_avatar.artifacts import FORMAT, MANIFEST, Artifacts, file_sha256, load_artifacts
from live_avatar.checkpoint import load_networks
from live_avatar.components import build_components
from live_avatar.config import Preset
from live_avatar.contract import Contract, contracts
from live_avatar.errors import ExportError
from live_avatar.version import __version__

Progress = Callable[[str], None]


def weight_file(component: str) -> str:
    """External file of a component; components of one network share theirs."""
    group = "dit" if component.startswith("dit_") else "vae" if component.startswith("vae_") else component
    return f"{group}.weights"


def export_artifacts(preset: Preset, output: Path, checkpoint: Path | None, progress: Progress) -> Artifacts:
    """Exports every component of a preset into the folder `output`, replacing artifacts that stand there.

    `progress` is told each component's name before its export. Raises `ExportError` if `output` exists and is not an
    artifacts folder, and `CheckpointError` for unusable weights.
    """
    if output.exists() and not _replaceable(output):
        raise ExportError(f"{output} exists and is not an artifacts folder; choose another --output or remove it.")
    parts = build_components(preset, load_networks(preset, checkpoint))
    agreed = contracts(preset)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as unfinished:
        folder = Path(unfinished) / output.name
        folder.mkdir()
        _write_graphs(parts, agreed, folder, progress)
        manifest = _manifest(preset, agreed, folder, checkpoint)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
        if output.exists():
            shutil.rmtree(output)
        folder.rename(output)
    return load_artifacts(output)


def _replaceable(output: Path) -> bool:
    """Whether it is an empty folder, or artifacts of any version: a manifest of something else is no licence."""
    if not output.is_dir() or not any(output.iterdir()):
        return output.is_dir()
    try:
        manifest = json.loads((output / MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and {"format", "contracts", "files"} <= manifest.keys()


def _write_graphs(parts: dict[str, nn.Module], agreed: dict[str, Contract], folder: Path, progress: Progress) -> None:
    by_file: dict[str, list[str]] = {}
    for name in agreed:
        by_file.setdefault(weight_file(name), []).append(name)
    for file, names in by_file.items():
        with SharedWeights(folder / file) as weights:
            for name in names:
                progress(name)
                model = export_graph(parts[name], agreed[name])
                weights.move(model)
                onnx.save(model, folder / f"{name}.onnx")
    for name in agreed:
        onnx.checker.check_model(folder / f"{name}.onnx", full_check=True)


def _manifest(preset: Preset, agreed: dict[str, Contract], folder: Path, checkpoint: Path | None) -> dict[str, Any]:
    files = sorted(path for path in folder.iterdir())
    weights = (
        {path.name: file_sha256(path) for path in sorted(checkpoint.glob("*.safetensors"))} if checkpoint else None
    )
    return {
        "format": FORMAT,
        "version": __version__,
        "preset": preset.to_dict(),
        "weights": weights or f"random, seed {preset.weight_seed}",
        "opset": OPSET,
        "made_with": {
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
        "contracts": {name: contract.to_dict() for name, contract in agreed.items()},
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files},
    }
