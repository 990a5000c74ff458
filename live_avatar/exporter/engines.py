"""Engines of an artifacts folder, built by TensorRT on the machine that will run them.

`python -m export.engines --artifacts artifacts/s2v-14b` is what an init container calls: it prints a line per engine,
keeps engines that are up to date, waits while another process builds, and is done when all engines are there. One
engine per graph, strongly typed: the types are those of the graph. Nothing of the graph's files is changed.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import external_data_helper

from live_avatar.errors import ArtifactError, ExportError
from live_avatar.graphs.artifacts import Artifacts, load_artifacts
from live_avatar.graphs.contract import Contract, Extent
from live_avatar.graphs.digests import file_digests
from live_avatar.graphs.engines import FOLDER, Engine, engine_path, fault, read_engines, write_engines
from live_avatar.graphs.memory import require_room, workspace_bytes
from live_avatar.runtime.tensorrt_runtime import Backend, CudaDevice, Device, open_backend

LOCK = "lock"
TIMING_CACHE = "timing.cache"
DECOMPOSABLE = "TRT_decomposable"
"""Attribute of `Attention` for TensorRT's parser: several kernels may be taken where there is no fused one (such as
for float32, or the wide head of the VAE). Without it such a graph cannot be built."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class EngineOptions:
    """components: those to build, all if empty; weights_on_host: those whose weights are streamed in every run;
    rebuild: also those that are up to date; gpu_memory_gib: refuse what would not fit; device: number of the GPU.
    """

    components: Sequence[str] = ()
    weights_on_host: Sequence[str] = ()
    rebuild: bool = False
    gpu_memory_gib: float | None = None
    sessions: int = 1
    device: int = 0


def build_engines(
    folder: Path,
    options: EngineOptions,
    progress: Progress,
    open_device: Callable[[int], Device] = CudaDevice,
) -> dict[str, Engine]:
    """Builds what is not up to date, and gives the records of all engines of the folder.

    Raises `ArtifactError` for artifacts that cannot be read, `CapacityError` if they would not fit the GPU, and
    `ExportError` without TensorRT or a GPU, for an unknown component, or with TensorRT's own words if a build fails.
    """
    artifacts = load_artifacts(folder)
    for name in (*options.components, *options.weights_on_host):
        if name not in artifacts.contracts:
            raise ExportError(f"{folder} has no component {name!r}; it has {', '.join(sorted(artifacts.contracts))}.")
    if options.gpu_memory_gib is not None:
        fp8 = artifacts.manifest["fp8"] is not None
        require_room(artifacts.preset, options.gpu_memory_gib, options.sessions, fp8)
    backend = require_tensorrt(options.device, open_device)
    (folder / FOLDER).mkdir(exist_ok=True)
    with _locked(folder / FOLDER / LOCK, progress):
        engines = read_engines(artifacts)
        for name in options.components or artifacts.contracts:
            on_host = name in options.weights_on_host
            reason = _stale(artifacts, name, engines.get(name), backend, on_host)
            if reason is None and not options.rebuild:
                progress(f"{name}: up to date")
                continue
            progress(f"{name}: {reason or 'is built again, as asked'}; building for {backend.machine}")
            engines[name] = _build(artifacts, name, backend, on_host)
            write_engines(artifacts, engines)
            progress(f"{name}: {engines[name].bytes} bytes in {engines[name].build_s} s")
        return engines


def require_tensorrt(device: int = 0, open_device: Callable[[int], Device] = CudaDevice) -> Backend:
    """TensorRT and a GPU. Raises `ExportError`, with the remedy, where one of them is missing."""
    try:
        return open_backend(device, open_device)
    except ArtifactError as error:
        raise ExportError(
            f"engines cannot be built here: {error} Or export here with --target onnx --precision bfloat16, and build "
            "them there with `python -m export.engines`."
        ) from error


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """Only one process at a time is in here; the lock ends with its process."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another process that builds engines ({path})")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _stale(artifacts: Artifacts, name: str, engine: Engine | None, backend: Backend, on_host: bool) -> str | None:
    """Why the engine must be built, as the end of a sentence; None if it is up to date."""
    reason = fault(artifacts, name, engine, backend.machine)
    if reason is None and engine is not None and engine.weights_on_host != on_host:
        return f"has its weights on the {'host' if engine.weights_on_host else 'GPU'}"
    return reason


def _build(artifacts: Artifacts, name: str, backend: Backend, on_host: bool) -> Engine:
    """Builds one engine and puts it, and the timing cache, into their places."""
    start = time.monotonic()
    with artifacts.reading(name) as path, backend.device.working():
        model = onnx.load(path, load_external_data=False)
        plan, cache = _compile(backend, model, path, artifacts.contracts[name], on_host)
    written = engine_path(artifacts, name)
    _write(written, plan)
    _write(written.with_name(TIMING_CACHE), cache)
    return Engine(
        machine=backend.machine,
        files={file: artifacts.manifest["files"][file]["digest"] for file in _files(path, model)},
        weights_on_host=on_host,
        build_s=round(time.monotonic() - start, 1),
        bytes=written.stat().st_size,
        digest=file_digests([written])[written],
    )


def _files(path: Path, model: onnx.ModelProto) -> list[str]:
    """Names of the graph's file and of those that its weights are in."""
    outside = [tensor for tensor in model.graph.initializer if external_data_helper.uses_external_data(tensor)]
    return [path.name, *sorted({external_data_helper.ExternalDataInfo(tensor).location for tensor in outside})]


def _compile(
    backend: Backend, model: onnx.ModelProto, path: Path, contract: Contract, on_host: bool
) -> tuple[Any, Any]:
    """The engine's plan and the timing cache, serialized. Raises `ExportError` with TensorRT's own words."""
    trt = backend.trt
    builder = trt.Builder(backend.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, backend.logger)
    for node in model.graph.node:
        if node.op_type == "Attention":
            node.attribute.append(onnx.helper.make_attribute(DECOMPOSABLE, 1))
    if not parser.parse(model.SerializeToString(), str(path)):
        errors = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise ExportError(f"TensorRT {trt.__version__} cannot read {path}: {errors}; export it again.")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes(contract.name))
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 in a graph means float32
    if on_host:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    for profile in contract.profiles:
        config.add_optimization_profile(_profile(builder, contract, profile))
    cache = _timing_cache(config, path.parent / FOLDER / TIMING_CACHE)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(
            f"TensorRT {trt.__version__} cannot build {contract.name}: {backend.logger.reason()}; see whether the GPU "
            "has room and this version of TensorRT is supported."
        )
    return plan, cache.serialize()


def _profile(builder: Any, contract: Contract, name: str) -> Any:
    """The ranges of a profile. A least extent of 0 is allowed, and means what it says (no history)."""
    profile = builder.create_optimization_profile()
    for spec in contract.inputs:
        if any(isinstance(extent, str) for extent in spec.shape):
            profile.set_shape(spec.name, *(contract.shape(spec, extent, name) for extent in Extent))
    return profile


def _timing_cache(config: Any, path: Path) -> Any:
    """The folder's cache, or an empty one if there is none or it is of another version or GPU."""
    for stored in (path.read_bytes() if path.is_file() else b"", b""):
        cache = config.create_timing_cache(stored)
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
    raise ExportError(f"TensorRT takes no timing cache, not even an empty one; remove {path}.")


def _write(path: Path, data: Any) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".part")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
