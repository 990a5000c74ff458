"""Artifacts on TensorRT or TensorRT-RTX: engines run on one GPU; torch tensors are the device's memory.

What crosses between host and GPU. Resident tensors (caches, states) come in and go out as torch tensors of the GPU.
All others are numpy arrays: they are copied into buffers that stay where they are, and results are copied out.

Profiles. A graph with symbolic dimensions has one optimization profile or several; a run takes the one that its inputs
fit, and an execution context serves one profile.

Two paths. A profile in which a dimension grows (a block with its history) has a steady state, in which that dimension
is at its greatest: there its call is captured into a CUDA graph, once for each set of resident tensors, that is for
each session and step, and replayed as long as the same tensors come. Everything else (the first blocks of a session,
whose histories are copied to be contiguous; a sink; graphs of fixed shapes, which run at the start of a session or are
few large kernels) is enqueued as it is. A captured call has an execution context of its own, and all contexts of all
graphs share one block of activation memory, because they run one after another.

Buffers. Inputs of the host and transient ones are copied into buffers that stay where they are. A graph with symbolic
dimensions writes its resident outputs into buffers of its own, too, which the next run overwrites: a ring and a sink
copy them at once. The resident outputs of other graphs are new tensors that belong to the caller, because a state comes
back as the next input while its successor is written.

Flavours. The engines' records name the library that they run on (`graphs/flavours.py`). TensorRT-RTX finishes its
kernels here, when an engine is loaded and when a shape is new; `kernel_cache.py` keeps them between starts.

Weights. TensorRT gives every engine its own copy of its weights. An engine built with its weights on the host keeps
none of them on the GPU and streams them in every run: that is for graphs that seldom run, such as the text encoder.

One runtime serves one thread. It has one stream, on which everything that it enqueues is in order; a run starts after
what its caller has enqueued, and has ended when it returns.
"""

from __future__ import annotations

import math
import mmap
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from live_avatar.errors import ArtifactError
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.graphs.contract import Contract, Extent, GraphTensor
from live_avatar.graphs.engines import (
    Engine,
    Target,
    altered,
    build_command,
    engine_path,
    fault,
    flavour_of,
    read_engines,
)
from live_avatar.graphs.flavours import Flavour
from live_avatar.runtime import Allocator
from live_avatar.runtime.kernel_cache import KernelCache, cache_places
from live_avatar.runtime.tokenizer import verified_tokenizer

ALIGNMENT = 256  # bytes, of every address that is bound (TensorRT documentation of setTensorAddress)
KEPT_CAPTURES = 32  # of one graph: the sessions that take turns, times the steps
REASONS = 3  # last errors of TensorRT's log that a message quotes

Inputs = Mapping[str, Any]
"""Arrays by name: numpy's, or torch tensors of the GPU for the resident ones."""


class Device(Protocol):
    """The GPU, and the one stream on which a runtime enqueues its work."""

    torch_device: torch.device
    gpu: str
    compute_capability: str
    stream: int
    """Handle of the stream."""

    def working(self) -> AbstractContextManager[None]:
        """A `with` block whose torch calls go to the stream, after all that was enqueued before; waits at its end."""
        ...

    def free_bytes(self) -> int:
        """Memory of the GPU that no one holds, and that torch holds but does not use."""
        ...

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Records what `enqueue` would enqueue, without doing it; returns what enqueues it as one."""
        ...


class CudaDevice:
    """GPU number `index`. Raises `ArtifactError` if there is none."""

    def __init__(self, index: int) -> None:
        count = torch.cuda.device_count()
        if index >= count:
            raise ArtifactError(
                f"GPU {index} does not exist, torch {torch.__version__} sees {count} GPUs; run this on a machine with "
                "an NVIDIA GPU, its driver and torch for CUDA."
            )
        self.torch_device = torch.device("cuda", index)
        self.gpu = torch.cuda.get_device_name(index)
        self.compute_capability = "{}.{}".format(*torch.cuda.get_device_capability(index))
        self._stream = torch.cuda.Stream(self.torch_device)
        self.stream: int = self._stream.cuda_stream

    @contextmanager
    def working(self) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream(self.torch_device))
        with torch.cuda.device(self.torch_device), torch.cuda.stream(self._stream):
            yield
            self._stream.synchronize()

    def free_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        unused = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(self.torch_device)
        return int(free + unused)

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            enqueue()
        return graph.replay


@dataclass(frozen=True)
class Library:
    """The module of a flavour, and its log."""

    flavour: Flavour
    trt: Any
    logger: Any

    @property
    def version(self) -> str:
        return str(self.trt.__version__)

    def __str__(self) -> str:
        return f"{self.flavour.title} {self.version}"


def open_library(flavour: Flavour) -> Library:
    """Raises `ArtifactError`, with the remedy, if the module is missing or too old for the graphs."""
    try:
        trt = import_module(flavour.module)
    except (ImportError, OSError) as error:
        raise ArtifactError(
            f"{flavour.title} cannot be imported ({error}); install it with {flavour.install}, or run this in an image "
            "that has it (docker/)."
        ) from error
    if tuple(int(part) for part in trt.__version__.split(".")[:2]) < flavour.least_version:
        raise ArtifactError(
            f"this is {flavour.title} {trt.__version__}, too old for the graphs; install {flavour.least} or newer with "
            f"{flavour.install}."
        )
    return Library(flavour, trt, make_logger(trt))


def make_logger(trt: Any) -> Any:
    """TensorRT's log, of which the last errors are kept for a message: `reason()` gives them."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._errors: deque[str] = deque(maxlen=REASONS)

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self._errors.append(msg.strip())

        def reason(self) -> str:
            return "; ".join(self._errors) or "it gave no reason"

    return Logger()


@dataclass(frozen=True)
class Backend:
    """A library on one GPU: what loads engines (and must live as long as they), and the GPU."""

    library: Library
    runtime: Any
    device: Device

    @property
    def machine(self) -> Target:
        return machine(self.library, self.device)

    def types(self) -> dict[str, Any]:
        """The library's type for every type name of a contract."""
        types = self.library.trt.DataType
        return {
            "float32": types.FLOAT,
            "float16": types.HALF,
            "bfloat16": types.BF16,
            "float8_e4m3fn": types.FP8,
            "int64": types.INT64,
            "uint8": types.UINT8,
        }


def machine(library: Library, device: Device) -> Target:
    """What this machine runs."""
    return Target(library.flavour.name, library.version, (device.compute_capability,), device.gpu)


def open_backend(flavour: Flavour, device: int, open_device: Callable[[int], Device] = CudaDevice) -> Backend:
    """Raises `ArtifactError` without the flavour's library or without that GPU."""
    library = open_library(flavour)
    return Backend(library, library.trt.Runtime(library.logger), open_device(device))


@dataclass(frozen=True)
class _Captured:
    """A call that can be replayed; the context must live as long as it."""

    context: Any
    outputs: Mapping[str, Tensor]
    replay: Callable[[], None]


class Scratch:
    """Activation memory: one block, as large as the graph that needs most."""

    def __init__(self, device: torch.device) -> None:
        self.memory = torch.empty((ALIGNMENT,), dtype=torch.uint8, device=device)

    def reserve(self, size: int) -> None:
        """Makes it at least so large. A block that it replaces is free for others at once: no graph is running."""
        if size > self.memory.numel():
            self.memory = torch.empty((size,), dtype=torch.uint8, device=self.memory.device)


class TensorRTGraph:
    """One engine and the buffers around it."""

    def __init__(
        self, backend: Backend, engine: Any, contract: Contract, places: Sequence[Path], scratch: Scratch
    ) -> None:
        """places: files that may keep the kernels of a library that finishes them here. scratch: of the runtime."""
        self._library = backend.library
        self._device = backend.device
        self._engine = engine
        self._contract = contract
        kept = [spec for spec in contract.inputs if not spec.resident or spec.transient]
        kept += [spec for spec in contract.outputs if not spec.resident or contract.profiles]
        self._buffers = {spec.name: self._empty((contract.largest(spec),), spec.dtype) for spec in kept}
        self._nothing = self._empty((ALIGNMENT,), "uint8")
        self._scratch = scratch
        scratch.reserve(engine.device_memory_size_v2)
        self._kernels: KernelCache | None = None
        self._settings = self._context_settings(places)
        self._kernels_of: set[tuple[tuple[int, ...], ...]] = set()
        self._contexts = {profile: self._new_context(profile) for profile in contract.profiles or (None,)}
        self._captured: OrderedDict[tuple[int, ...], _Captured] = OrderedDict()

    def run(self, inputs: Inputs) -> dict[str, Any]:
        """Outputs by name. The head of the module says which of them the next run overwrites.

        Raises `ArtifactError` for inputs that are not as the contract says.
        """
        profile, steady = self._check(inputs)
        with self._device.working():
            bound = {spec.name: self._input(spec, inputs[spec.name]) for spec in self._contract.inputs}
            outputs = self._replay(bound, profile) if steady else self._launch(self._contexts[profile], bound)
            self._keep_kernels(inputs)
            return {
                spec.name: outputs[spec.name] if spec.resident else outputs[spec.name].to("cpu", copy=True).numpy()
                for spec in self._contract.outputs
            }

    def _check(self, inputs: Inputs) -> tuple[str | None, bool]:
        """Compares inputs with the contract; gives their profile, and whether they are in its steady state."""
        extents: dict[str, int] = {}
        for spec in self._contract.inputs:
            shape = tuple(inputs[spec.name].shape)
            dtype = str(inputs[spec.name].dtype).removeprefix("torch.")
            for extent, found in zip(spec.shape, shape, strict=False):
                if isinstance(extent, str):
                    extents.setdefault(extent, found)
            expected = tuple(extents.get(d, 0) if isinstance(d, str) else d for d in spec.shape)
            if (shape, dtype) != (expected, spec.dtype):
                raise ArtifactError(
                    f"{self._contract.name}: {spec.name} is {dtype} {list(shape)}, expected {spec.dtype} "
                    f"{list(spec.shape)}; use artifacts and a program of one version."
                )
        return self._profile(extents) if extents else (None, False)

    def _profile(self, extents: Mapping[str, int]) -> tuple[str, bool]:
        """The profile whose ranges hold the extents, and whether its growing dimensions are at their greatest."""
        for profile, ranges in self._contract.profiles.items():
            if all(ranges[name][Extent.MIN] <= size <= ranges[name][Extent.MAX] for name, size in extents.items()):
                growing = [name for name in extents if ranges[name][Extent.MIN] < ranges[name][Extent.MAX]]
                full = all(extents[name] == ranges[name][Extent.MAX] for name in growing)
                return profile, bool(growing) and full
        found = ", ".join(f"{name} {size}" for name, size in extents.items())
        raise ArtifactError(
            f"{self._contract.name} has no profile for {found}; it has {', '.join(self._contract.profiles)}: use "
            "artifacts and a program of one version."
        )

    def _replay(self, inputs: Mapping[str, Tensor], profile: str | None) -> Mapping[str, Tensor]:
        # A captured call writes where the scratch memory was then.
        resident = [inputs[spec.name] for spec in self._contract.inputs if spec.resident]
        key = tuple(tensor.data_ptr() for tensor in (self._scratch.memory, *resident))
        if key in self._captured:
            self._captured.move_to_end(key)
            self._captured[key].replay()
        else:
            self._captured[key] = self._capture(inputs, profile)
            if len(self._captured) > KEPT_CAPTURES:
                self._captured.popitem(last=False)
        return self._captured[key].outputs

    def _capture(self, inputs: Mapping[str, Tensor], profile: str | None) -> _Captured:
        """Runs once as it is, which also makes TensorRT settle what depends on shapes, and then captures."""
        context = self._new_context(profile)
        outputs = self._launch(context, inputs)
        return _Captured(context, outputs, self._device.capture(lambda: self._enqueue(context)))

    def _launch(self, context: Any, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Gives the context its memory, and shapes and addresses of all tensors; enqueues it; returns the outputs."""
        context.set_device_memory(self._scratch.memory.data_ptr(), self._scratch.memory.numel())
        for spec in self._contract.inputs:
            if any(isinstance(extent, str) for extent in spec.shape):
                self._demand(context.set_input_shape(spec.name, tuple(inputs[spec.name].shape)))
        outputs = {
            spec.name: self._output(spec, tuple(context.get_tensor_shape(spec.name))) for spec in self._contract.outputs
        }
        for name, tensor in (*inputs.items(), *outputs.items()):
            bound = tensor if tensor.numel() else self._nothing  # an empty tensor needs an address, too
            self._demand(context.set_tensor_address(name, bound.data_ptr()))
        self._enqueue(context)
        return outputs

    def _enqueue(self, context: Any) -> None:
        self._demand(context.execute_async_v3(self._device.stream))

    def _demand(self, done: bool) -> None:
        if not done:
            raise ArtifactError(
                f"{self._contract.name} cannot run on {self._device.gpu}: {self._library.logger.reason()}; "
                "build the engine again."
            )

    def _input(self, spec: GraphTensor, array: Any) -> Tensor:
        if spec.resident and not spec.transient:
            return array.contiguous()
        if not spec.resident:
            array = torch.from_numpy(np.require(array, requirements=["C", "W"]))
        return self._view(spec, array.shape).copy_(array)

    def _output(self, spec: GraphTensor, shape: tuple[int, ...]) -> Tensor:
        return self._view(spec, shape) if spec.name in self._buffers else self._empty(shape, spec.dtype)

    def _view(self, spec: GraphTensor, shape: tuple[int, ...]) -> Tensor:
        """The spec's buffer, as much of it as the shape takes."""
        return self._buffers[spec.name][: math.prod(shape)].view(shape)

    def _empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=self._device.torch_device)

    def _context_settings(self, places: Sequence[Path]) -> Any:
        """What execution contexts are made with: activation memory is ours, and kernels made here are kept."""
        trt = self._library.trt
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self._library.flavour.jit:
            return strategy
        settings = self._engine.create_runtime_config()
        settings.set_execution_context_allocation_strategy(strategy)
        settings.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        settings.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self._kernels = KernelCache(settings, places)
        return settings

    def _keep_kernels(self, inputs: Inputs) -> None:
        """After the first run of every shape: only then are there new kernels."""
        if self._kernels is None:
            return
        shapes = tuple(tuple(inputs[spec.name].shape) for spec in self._contract.inputs)
        if shapes not in self._kernels_of:
            self._kernels_of.add(shapes)
            self._kernels.keep()

    def _new_context(self, profile: str | None) -> Any:
        context = self._engine.create_execution_context(self._settings)
        if profile is not None:
            number = list(self._contract.profiles).index(profile)
            self._demand(context.set_optimization_profile_async(number, self._device.stream))
        return context


def _zeros(device: torch.device, shape: tuple[int, ...], dtype: str) -> Any:
    return torch.zeros(shape, dtype=getattr(torch, dtype), device=device)


class TensorRTRuntime:
    """The engines of an artifacts folder on GPU number `device`."""

    def __init__(
        self, artifacts: Artifacts, device: int = 0, open_device: Callable[[int], Device] = CudaDevice
    ) -> None:
        """Raises `ArtifactError` without engines, without the library that they need, or without that GPU."""
        self.preset = artifacts.preset
        self.tokenizer = verified_tokenizer(artifacts)
        self._artifacts = artifacts
        self._engines = read_engines(artifacts)
        self._flavour = flavour_of(artifacts, self._engines)
        self._backend = open_backend(self._flavour, device, open_device)
        self.zeros: Allocator = partial(_zeros, self._backend.device.torch_device)
        self._scratch = Scratch(self._backend.device.torch_device)

    def free_bytes(self) -> int:
        return self._backend.device.free_bytes()

    def modulation(self, step: int) -> dict[str, Any]:
        made = self._artifacts.modulation(step)
        device = self._backend.device.torch_device
        return {name: torch.from_numpy(array).to(device, copy=True) for name, array in made.items()}

    def graph(self, component: str) -> TensorRTGraph:
        """Loads the component's engine. Raises `ArtifactError` for one of another library, GPU or graph."""
        engine = self._engines.get(component)
        reason = fault(self._artifacts, component, engine, self._backend.machine)
        if engine is None or reason is not None:
            raise self._refusal(component, reason or "has not been built")
        with self._backend.device.working():
            loaded = self._load(component, engine)
            places = cache_places(self._artifacts, component, engine)
            contract = self._artifacts.contracts[component]
            return TensorRTGraph(self._backend, loaded, contract, places, self._scratch)

    def _load(self, component: str, engine: Engine) -> Any:
        path = engine_path(self._artifacts, component)
        self._demand_unaltered(component, engine)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            loaded = self._backend.runtime.deserialize_cuda_engine(plan)
        self._demand_unaltered(component, engine)
        if loaded is None:
            raise self._refusal(component, f"cannot be loaded ({self._backend.library.logger.reason()})")
        if engine.weights_on_host:
            loaded.weight_streaming_budget_v2 = 0  # must stand before the first context
        contract, types = self._artifacts.contracts[component], self._backend.types()
        expected = {spec.name: types[spec.dtype] for spec in (*contract.inputs, *contract.outputs)}
        names = [loaded.get_tensor_name(index) for index in range(loaded.num_io_tensors)]
        if {name: loaded.get_tensor_dtype(name) for name in names} != expected:
            raise self._refusal(component, "has other inputs and outputs than its contract")
        return loaded

    def _demand_unaltered(self, component: str, engine: Engine) -> None:
        reason = altered(engine_path(self._artifacts, component), engine)
        if reason is not None:
            raise self._refusal(component, f"{reason}; remove it")

    def _refusal(self, component: str, reason: str) -> ArtifactError:
        path, command = engine_path(self._artifacts, component), build_command(self._artifacts, self._flavour)
        return ArtifactError(f"engine {path} {reason}; run {command} on this machine.")
