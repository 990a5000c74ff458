"""The TensorRT engines of an artifacts folder: where they are, and what each was made of and on.

An engine runs on the TensorRT and the GPU that it was built with, and stands for one graph and its weights. Written by
`live_avatar.exporter.engines`, read by the runtime.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from live_avatar.errors import ArtifactError
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.graphs.digests import file_digests
from live_avatar.json_files import read_json

FOLDER = "engines"
RECORDS = "engines.json"


@dataclass(frozen=True)
class Machine:
    """What an engine is bound to. Plans are not portable to other versions or GPUs (TensorRT documentation)."""

    tensorrt: str
    gpu: str
    compute_capability: str

    def __str__(self) -> str:
        return f"TensorRT {self.tensorrt} on {self.gpu} (compute capability {self.compute_capability})"


@dataclass(frozen=True)
class Engine:
    """What is known of one engine file.

    files: digests of the graph and of its weights, by file name, as in the manifest; weights_on_host: they stay in
    host memory and are streamed to the GPU in every run; bytes and digest are of the engine's own file.
    """

    machine: Machine
    files: Mapping[str, str]
    weights_on_host: bool
    build_s: float
    bytes: int
    digest: str


def engine_path(artifacts: Artifacts, component: str) -> Path:
    return artifacts.folder / FOLDER / f"{component}.plan"


def build_command(artifacts: Artifacts) -> str:
    """What makes the engines of a folder on this machine."""
    return f"`python -m export.engines --artifacts {artifacts.folder}`"


def read_engines(artifacts: Artifacts) -> dict[str, Engine]:
    """Records by component; none if no engine was built. Raises `ArtifactError` for records that are damaged."""
    path = artifacts.folder / FOLDER / RECORDS
    if not path.is_file():
        return {}
    try:
        return {
            name: Engine(**{**record, "machine": Machine(**record["machine"])})
            for name, record in read_json(path).items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{path} is not a record of engines ({error}); remove the folder and run {build_command(artifacts)}."
        ) from error


def write_engines(artifacts: Artifacts, engines: Mapping[str, Engine]) -> None:
    """Replaces the records as a whole."""
    path = artifacts.folder / FOLDER / RECORDS
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps({name: asdict(engine) for name, engine in engines.items()}, indent=1))
    os.replace(partial, path)


def fault(artifacts: Artifacts, component: str, engine: Engine | None, machine: Machine) -> str | None:
    """Why the component's engine cannot be used on this machine, as the end of a sentence; None if it can.

    The engine's file is not read for that: see `altered`.
    """
    path = engine_path(artifacts, component)
    if engine is None or not path.is_file():
        return "has not been built"
    if engine.machine != machine:
        return f"was built by {engine.machine}, but this is {machine}"
    known = artifacts.manifest["files"]
    for name, digest in engine.files.items():
        if name not in known or known[name]["digest"] != digest:
            return f"was built from another {name}"
    if path.stat().st_size != engine.bytes:
        return f"has {path.stat().st_size} bytes, but {engine.bytes} were written"
    return None


def altered(path: Path, engine: Engine) -> str | None:
    """How the engine's file differs from the one that was built, as the end of a sentence; None if it does not."""
    try:
        (digest,) = file_digests([path]).values()
    except OSError as error:
        return f"cannot be read ({error})"
    if digest != engine.digest:
        return f"has digest {digest[:12]}, expected {str(engine.digest)[:12]}, so it was changed after it was built"
    return None
