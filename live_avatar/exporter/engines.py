"""Engines of an artifacts folder: built by TensorRT on the machine that runs them, by TensorRT-RTX on any machine.

`python -m export.engines --artifacts artifacts/s2v-14b` is what an init container calls: it prints a line per engine,
keeps engines that are up to date, waits while another process builds, and is done when all engines are there. One
engine per graph, strongly typed: the types are those of the graph. Nothing of the graph's files is changed.

The compiler works in a thread of its own, so that an interruption arrives at once. It is told to stop, which it does
between two of its own steps. Engines that were built stay.
"""

from __future__ import annotations

import fcntl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import onnx
from onnx import external_data_helper

from live_avatar.config import Preset
from live_avatar.errors import ArtifactError, ExportError
from live_avatar.graphs.artifacts import Artifacts, load_artifacts
from live_avatar.graphs.contract import Contract, Extent
from live_avatar.graphs.digests import file_digests
from live_avatar.graphs.engines import (
    FOLDER,
    Engine,
    Target,
    engine_path,
    fault,
    read_engines,
    write_engines,
    write_whole,
    written_whole,
)
from live_avatar.graphs.flavours import TENSORRT, TENSORRT_RTX, Flavour
from live_avatar.graphs.memory import require_room, workspace_bytes
from live_avatar.runtime.tensorrt_runtime import CudaDevice, Device, Library, machine, open_library

LOCK = "lock"
TIMING_CACHE = "timing.cache"
DECOMPOSABLE = "TRT_decomposable"
"""Attribute of `Attention` for TensorRT's parser: several kernels may be taken where there is no fused one. Without it
such a graph cannot be built; ONNX Runtime would refuse it in the file."""

LEAST_CAPABILITIES = {"fp8": (8, 9), "bfloat16": (8, 0)}
"""First compute capability that has a precision (support matrices of both libraries)."""

Progress = Callable[[str], None]
OpenDevice = Callable[[int], Device]


@dataclass(frozen=True)
class EngineOptions:
    """flavour: the compiler; capabilities: what a compiler that needs no GPU compiles for ("8.9"), this machine's GPU
    if none is named; components: those to build, all if empty; weights_on_host: those whose weights are streamed in
    every run; rebuild: also those that are up to date; gpu_memory_gib: refuse what would not fit; device: number of the
    GPU.
    """

    flavour: Flavour = TENSORRT
    capabilities: Sequence[str] = ()
    components: Sequence[str] = ()
    weights_on_host: Sequence[str] = ()
    rebuild: bool = False
    gpu_memory_gib: float | None = None
    sessions: int = 1
    device: int = 0


@dataclass(frozen=True)
class Compiler:
    """A library, what it compiles for, and the GPU on which it times kernels (None: it needs none)."""

    library: Library
    target: Target
    device: Device | None


def build_engines(
    folder: Path, options: EngineOptions, progress: Progress, open_device: OpenDevice = CudaDevice
) -> dict[str, Engine]:
    """Builds what is not up to date, and gives the records of all engines of the folder.

    Raises `ArtifactError` for artifacts that cannot be read, `CapacityError` if they would not fit the GPU, and
    `ExportError` without the library or a GPU that it needs, for a component, a compute capability or a precision that
    does not exist there, with the compiler's own words if a build fails, or if there is no room to write.
    """
    artifacts = load_artifacts(folder)
    for name in (*options.components, *options.weights_on_host):
        if name not in artifacts.contracts:
            raise ExportError(f"{folder} has no component {name!r}; it has {', '.join(sorted(artifacts.contracts))}.")
    fp8 = artifacts.manifest["fp8"] is not None
    if options.gpu_memory_gib is not None:
        require_room(artifacts.preset, options.gpu_memory_gib, options.sessions, fp8)
    compiler = require_compiler(options, artifacts.preset, fp8, open_device)
    with _writing(folder / FOLDER):
        (folder / FOLDER).mkdir(exist_ok=True)
    with _locked(folder / FOLDER / LOCK, progress):
        built: list[str] = []
        try:
            return _build_stale(artifacts, options, compiler, progress, built)
        except KeyboardInterrupt:
            progress(f"interrupted; built and kept: {', '.join(built) or 'none'}; the same command builds the rest")
            raise


def _build_stale(
    artifacts: Artifacts, options: EngineOptions, compiler: Compiler, progress: Progress, built: list[str]
) -> dict[str, Engine]:
    """Adds the names of the engines that it builds to `built`."""
    engines = read_engines(artifacts)
    for name in options.components or artifacts.contracts:
        on_host = name in options.weights_on_host
        reason = _stale(artifacts, name, engines.get(name), compiler.target, on_host)
        if reason is None and not options.rebuild:
            progress(f"{name}: up to date")
            continue
        progress(f"{name}: {reason or 'is built again, as asked'}; building with {compiler.target}")
        engines[name] = _build(artifacts, name, compiler, on_host)
        with _writing(artifacts.folder / FOLDER):
            write_engines(artifacts, engines)
        built.append(name)
        progress(f"{name}: {engines[name].bytes} bytes in {engines[name].build_s} s")
    return engines


def require_compiler(
    options: EngineOptions, preset: Preset, fp8: bool = False, open_device: OpenDevice = CudaDevice
) -> Compiler:
    """The compiler of the options, ready to build the preset's graphs, with FP8 linears or not. No GPU is opened if
    compute capabilities are named.

    Raises `ExportError`, with the remedy, where the library, the GPU, a compute capability or its precision is missing.
    """
    flavour = options.flavour
    if options.capabilities and not flavour.ahead_of_time:
        raise ExportError(
            f"{flavour.title} builds for the GPU of this machine, not for compute capability "
            f"{', '.join(options.capabilities)}; leave --compute-capability out, or give --target {TENSORRT_RTX.name}."
        )
    try:
        library = open_library(flavour)
    except ArtifactError as error:
        raise _cannot_build(f"{error}") from error
    if options.capabilities:
        capabilities = tuple(dict.fromkeys(options.capabilities))
        compiler = Compiler(library, Target(flavour.name, library.version, capabilities, None), None)
    else:
        compiler = _compiler_here(library, options.device, open_device)
    _require_known(library, compiler.target.compute_capabilities)
    _require_precisions(compiler.target.compute_capabilities, preset, fp8)
    return compiler


def _compiler_here(library: Library, index: int, open_device: OpenDevice) -> Compiler:
    """For the GPU of this machine."""
    try:
        device = open_device(index)
    except ArtifactError as error:
        ahead = " Or name the GPU's --compute-capability: no GPU is needed then." * library.flavour.ahead_of_time
        raise _cannot_build(f"{error}{ahead}") from error
    here = machine(library, device)
    if not library.flavour.ahead_of_time:
        return Compiler(library, here, device)
    return Compiler(library, Target(here.flavour, here.version, here.compute_capabilities, None), None)


def _cannot_build(reason: str) -> ExportError:
    return ExportError(
        f"engines cannot be built here: {reason} Or export here with --target onnx --precision bfloat16, and build "
        "them there with `python -m export.engines`."
    )


def _require_known(library: Library, capabilities: Sequence[str]) -> None:
    if not library.flavour.ahead_of_time:
        return
    known = compute_capabilities(library)
    for capability in capabilities:
        if capability not in known:
            raise ExportError(
                f"{library} does not compile for compute capability {capability!r}, only for {', '.join(known)}; give "
                f"one of these, or build on that GPU with --target {TENSORRT.name}."
            )


def compute_capabilities(library: Library) -> dict[str, Any]:
    """Those that a library compiles for without a GPU, by their usual names: `8.9` is its member `SM89`."""
    members = library.trt.ComputeCapability.__members__
    return {f"{name[2:-1]}.{name[-1]}": member for name, member in members.items() if name.startswith("SM")}


def _require_precisions(capabilities: Sequence[str], preset: Preset, fp8: bool) -> None:
    if fp8:
        _require_precision(capabilities, "fp8", "these graphs are", "without --fp8")
    if preset.kv_cache_dtype is not None:
        _require_precision(capabilities, preset.kv_cache_dtype, "past keys and values are", "without --kv-cache-dtype")
    _require_precision(capabilities, preset.precision, "these graphs are", "with --precision float32")


def _require_precision(capabilities: Sequence[str], precision: str, subject: str, remedy: str) -> None:
    """`subject` begins the sentence, `remedy` says how to export instead."""
    least = LEAST_CAPABILITIES.get(precision)
    for capability in capabilities:
        if least is not None and tuple(map(int, capability.split("."))) < least:
            raise ExportError(
                f"{subject} in {precision}, which GPUs have from compute capability {least[0]}.{least[1]} on, not "
                f"{capability}; export {remedy} for that GPU."
            )


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Says what to do where the folder cannot be written."""
    try:
        yield
    except OSError as error:
        raise ExportError(
            f"{folder} cannot be written ({error.strerror}); make room or make it writable, and give the same command "
            "again: the engines that were built are kept."
        ) from error


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """Only one process at a time is in here; the lock ends with its process."""
    with _writing(path.parent):
        file = path.open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another process that builds engines ({path})")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _stale(artifacts: Artifacts, name: str, engine: Engine | None, target: Target, on_host: bool) -> str | None:
    """Why the engine must be built, as the end of a sentence; None if it is up to date."""
    reason = fault(artifacts, name, engine, target)
    if reason is None and engine is not None and engine.weights_on_host != on_host:
        return f"has its weights on the {'host' if engine.weights_on_host else 'GPU'}"
    return reason


def _build(artifacts: Artifacts, name: str, compiler: Compiler, on_host: bool) -> Engine:
    """Builds one engine into its file, and puts the timing cache, if there is one, into its place."""
    start = time.monotonic()
    written = engine_path(artifacts, name)
    with artifacts.reading(name) as path:
        model = onnx.load(path, load_external_data=False)
        with _writing(written.parent), written_whole(written) as file:
            cache = _cancellable(lambda stop: compile_graph(compiler, artifacts, name, model, file, on_host, stop))
    if cache is not None:
        with _writing(written.parent):
            write_whole(written.with_name(TIMING_CACHE), cache)
    return Engine(
        target=compiler.target,
        files={file: artifacts.manifest["files"][file]["digest"] for file in _files(path, model)},
        weights_on_host=on_host,
        build_s=round(time.monotonic() - start, 1),
        bytes=written.stat().st_size,
        digest=file_digests([written])[written],
    )


def _cancellable(work: Callable[[threading.Event], Any]) -> Any:
    """Runs `work` in a thread; when this one is interrupted, sets the event that `work` looks at, and waits for it."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(work, stop)
        try:
            return running.result()
        except BaseException:
            stop.set()
            raise


def _files(path: Path, model: onnx.ModelProto) -> list[str]:
    """Names of the graph's file and of those that its weights are in."""
    outside = [tensor for tensor in model.graph.initializer if external_data_helper.uses_external_data(tensor)]
    return [path.name, *sorted({external_data_helper.ExternalDataInfo(tensor).location for tensor in outside})]


def compile_graph(
    compiler: Compiler,
    artifacts: Artifacts,
    name: str,
    model: onnx.ModelProto,
    plan: BinaryIO,
    on_host: bool,
    stop: threading.Event,
    detailed: bool = False,
) -> Any:
    """Writes the engine's plan, and gives the timing cache of a compiler that has one, serialized.

    model: the graph of the component `name`, without its weights; detailed: the compiler logs the kernels that it made.
    The plan goes to its file as it is made: a second copy in memory would be as large as the weights. Raises
    `ExportError` with the compiler's own words, and `OSError` if the plan cannot be written.
    """
    trt, logger = compiler.library.trt, compiler.library.logger
    path, contract = artifacts.graph_path(name), artifacts.contracts[name]
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if contract.decomposable:
        for node in model.graph.node:
            if node.op_type == "Attention":
                node.attribute.append(onnx.helper.make_attribute(DECOMPOSABLE, 1))
    if not parser.parse(model.SerializeToString(), str(path)):
        errors = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise ExportError(f"{compiler.library} cannot read {path}: {errors}; export it again.")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes(artifacts.preset, name))
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 in a graph means float32
    config.progress_monitor = _monitor(trt, stop)
    if detailed:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if on_host:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    for profile in contract.profiles:
        config.add_optimization_profile(_profile(builder, contract, profile))
    cache = _aim(compiler, config, path.parent / FOLDER / TIMING_CACHE)
    writer = _writer(trt, plan)
    with compiler.device.working() if compiler.device else nullcontext():
        done = builder.build_serialized_network_to_stream(network, config, writer)
    if writer.error is not None:
        raise writer.error
    if not done:
        raise ExportError(
            f"{compiler.library} cannot build {name}: {logger.reason()}; see whether the GPU has room and "
            "this version is supported, and for an attention without a fused kernel docs/real_model.md."
        )
    return None if cache is None else cache.serialize()


def _writer(trt: Any, file: BinaryIO) -> Any:
    """Takes an engine's plan piece by piece; keeps the error of a piece that could not be written."""

    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:
                self.error = error
                return 0

    return Writer()


def _monitor(trt: Any, stop: threading.Event) -> Any:
    """Tells the compiler after each of its steps whether it shall go on."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            pass

        def step_complete(self, phase_name: str, step: int) -> bool:
            return not stop.is_set()

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Monitor()


def _aim(compiler: Compiler, config: Any, timing_cache: Path) -> Any:
    """Names the compute capabilities of a compiler that needs no GPU; gives the timing cache of one that needs it."""
    if not compiler.library.flavour.ahead_of_time:
        return _timing_cache(config, timing_cache)
    known = compute_capabilities(compiler.library)
    config.num_compute_capabilities = len(compiler.target.compute_capabilities)
    for index, capability in enumerate(compiler.target.compute_capabilities):
        config.set_compute_capability(known[capability], index)
    return None


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
