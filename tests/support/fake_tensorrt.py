"""A stand-in for the module `tensorrt`, whose engines run the graph on ONNX Runtime at the addresses that are bound.

It has the part of TensorRT's Python API that the project uses, under the real names and with the real arguments
(`tests/export/test_tensorrt_api.py` compares them), and it refuses what TensorRT refuses: an unset, null, misaligned
or overlapping address, a shape outside the profile, missing activation memory, a plan of another version. `HostDevice`
stands in for the GPU: memory is the host's, and a captured call is replayed at the addresses of its capture.
"""

from __future__ import annotations

import enum
import itertools
import json
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from live_avatar.runtime.onnx_runtime import feed_value

HOST_ALIGNMENT = 64  # torch's own on a CPU; a GPU's memory is aligned to more than TensorRT wants
STREAM = 7
ACTIVATION_BYTES = 1000
NUMPY = {1: np.float32, 10: np.float16, 7: np.int64, 2: np.uint8, 17: ml_dtypes.float8_e4m3fn}  # by ONNX type

recording: list[Callable[[], None]] | None = None
"""What is enqueued while a call is captured; None at other times."""


class ILogger:
    class Severity(enum.Enum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3
        VERBOSE = 4

    def __init__(self) -> None:
        pass

    def log(self, severity: ILogger.Severity, msg: str) -> None:
        raise NotImplementedError

    def _error(self, msg: str) -> bool:
        self.log(ILogger.Severity.ERROR, msg)
        return False


class DataType(enum.Enum):
    FLOAT = 1
    HALF = 10
    BF16 = 16
    INT64 = 7
    UINT8 = 2
    FP8 = 17


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class BuilderFlag(enum.Enum):
    TF32 = 0
    WEIGHT_STREAMING = 1


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC = 0
    USER_MANAGED = 2


class IProgressMonitor:
    def __init__(self) -> None:
        pass

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        raise NotImplementedError

    def step_complete(self, phase_name: str, step: int) -> bool:
        raise NotImplementedError

    def phase_finish(self, phase_name: str) -> None:
        raise NotImplementedError


class IStreamWriter:
    def __init__(self) -> None:
        pass

    def write(self, data: Any, size: int) -> int:
        """The binding has a size here, and gives what overrides this the data alone, as bytes."""
        raise NotImplementedError


class ITimingCache:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def serialize(self) -> bytes:
        return self._data


class IOptimizationProfile:
    def __init__(self) -> None:
        self._shapes: dict[str, list[tuple[int, ...]]] = {}

    def set_shape(self, input: str, min: tuple[int, ...], opt: tuple[int, ...], max: tuple[int, ...]) -> None:
        if not all(0 <= least <= usual <= most for least, usual, most in zip(min, opt, max, strict=True)):
            raise ValueError("Shape provided for an optimization profile is inconsistent.")
        self._shapes[input] = [min, opt, max]


class IBuilderConfig:
    def __init__(self, version: str) -> None:
        self.progress_monitor: IProgressMonitor | None = None
        self._version = version
        self._flags = {BuilderFlag.TF32}
        self._pools: dict[MemoryPoolType, int] = {}
        self._profiles: list[IOptimizationProfile] = []
        self._cache: ITimingCache | None = None

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        self._pools[pool] = pool_size

    def set_flag(self, flag: BuilderFlag) -> None:
        self._flags.add(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self._flags.discard(flag)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def _grow_cache(self) -> None:
        """A timing cache grows with every engine that is built."""
        assert self._cache is not None
        self._cache._data += b"+1"

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(serialized_timing_cache or self._version.encode())

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self._cache = cache
        return ignore_mismatch or cache._data.split(b"+")[0] == self._version.encode()


class INetworkDefinition:
    def __init__(self, strongly_typed: bool) -> None:
        self._strongly_typed = strongly_typed
        self._model = onnx.ModelProto()
        self._path = ""


class ParserError:
    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text


class OnnxParser:
    known: ClassVar[set[str] | None] = None
    """Operators that can be read; None for all."""

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network = network
        self._errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def parse(self, model: bytes, path: str | None = None) -> bool:
        self._network._model = onnx.load_from_string(model)
        self._network._path = path or ""
        used = {node.op_type for node in self._network._model.graph.node}
        unknown = set() if self.known is None else used - self.known
        self._errors = [ParserError(f"No importer registered for op: {name}") for name in sorted(unknown)]
        return not unknown


class Builder:
    version: ClassVar[str]
    _config: ClassVar[type[IBuilderConfig]] = IBuilderConfig

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition(bool(flags & 1 << int(_creation_flags(self.version).STRONGLY_TYPED)))

    def create_builder_config(self) -> IBuilderConfig:
        return self._config(self.version)

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network_to_stream(
        self, network: INetworkDefinition, config: IBuilderConfig, writer: Any
    ) -> bool:
        """Writes a plan that says what it is of; none if the monitor wants to stop after the only step."""
        assert config.progress_monitor is not None
        config.progress_monitor.phase_start("Building engine", None, 1)
        go_on = config.progress_monitor.step_complete("Building engine", 0)
        config.progress_monitor.phase_finish("Building engine")
        if not go_on:
            self._logger._error("7: Build canceled by user")
            return False
        dynamic = [
            value.name
            for value in network._model.graph.input
            if any(dim.dim_param for dim in value.type.tensor_type.shape.dim)
        ]
        profiles = [profile._shapes for profile in config._profiles]
        given: set[str] = set.intersection(*map(set, profiles)) if profiles else set()
        if missing := sorted(set(dynamic) - given):
            self._logger._error("4: Network has dynamic inputs")
            self._logger._error(f"4: no optimization profile has been defined for {missing[0]}")
            return False
        config._grow_cache()
        plan = {
            "version": self.version,
            "path": network._path,
            "profiles": profiles,
            "strongly_typed": network._strongly_typed,
            "flags": sorted(flag.name for flag in config._flags),
            "workspace": config._pools[MemoryPoolType.WORKSPACE],
            "decomposable": [
                attribute.i
                for node in network._model.graph.node
                for attribute in node.attribute
                if attribute.name == "TRT_decomposable"
            ],
        }
        made = json.dumps(plan).encode()
        return sum(writer.write(piece) for piece in (made[:100], made[100:])) == len(made)


class Runtime:
    version: ClassVar[str]
    _engine: ClassVar[Callable[..., ICudaEngine]]

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        try:
            plan = json.loads(bytes(serialized_engine))
        except ValueError:
            plan = {"version": None}
        if plan["version"] != self.version:
            self._logger._error("6: The engine plan file is not compatible with this version of TensorRT")
            return None
        return self._engine(plan, self._logger)


class ICudaEngine:
    def __init__(self, plan: Mapping[str, Any], logger: ILogger) -> None:
        self.device_memory_size_v2 = ACTIVATION_BYTES
        self._plan = plan
        self._logger = logger
        self._contexts = 0
        self._budget: int | None = None
        graph = onnx.load(plan["path"], load_external_data=False).graph
        self._inputs = {value.name: value for value in graph.input}
        self._values = {value.name: value for value in (*graph.input, *graph.output)}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(plan["path"], options, providers=["CPUExecutionProvider"])
        self._output_shapes: dict[tuple[Any, ...], dict[str, tuple[int, ...]]] = {}

    @property
    def weight_streaming_budget_v2(self) -> int | None:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, size: int) -> None:
        assert "WEIGHT_STREAMING" in self._plan["flags"], "the engine was not built with weight streaming"
        assert self._contexts == 0, "the budget must be set before a context is made"
        self._budget = size

    @property
    def num_io_tensors(self) -> int:
        return len(self._values)

    def get_tensor_name(self, index: int) -> str:
        return list(self._values)[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType(self._type(name))

    def create_execution_context(self, strategy: Any) -> IExecutionContext:
        self._contexts += 1
        return IExecutionContext(self, strategy)

    def _shape(self, name: str) -> tuple[int, ...]:
        """-1 for symbolic dimensions."""
        dims = self._values[name].type.tensor_type.shape.dim
        return tuple(-1 if dim.dim_param else dim.dim_value for dim in dims)

    def _type(self, name: str) -> int:
        return int(self._values[name].type.tensor_type.elem_type)

    def _numpy(self, name: str) -> Any:
        return NUMPY[self._type(name)]

    def _outputs_of(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Shapes of outputs, found by running the graph on zeros."""
        key = tuple(shapes.items())
        if key not in self._output_shapes:
            zeros = {name: feed_value(np.zeros(shape, self._numpy(name))) for name, shape in shapes.items()}
            names = [name for name in self._values if name not in self._inputs]
            arrays = self._session.run(names, zeros)
            self._output_shapes[key] = {name: array.shape for name, array in zip(names, arrays, strict=True)}
        return self._output_shapes[key]


Runtime._engine = ICudaEngine


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, strategy: ExecutionContextAllocationStrategy) -> None:
        self._engine = engine
        self._memory_given = strategy != ExecutionContextAllocationStrategy.USER_MANAGED
        self._profile = 0
        self._shapes = {name: engine._shape(name) for name in engine._inputs}
        self._addresses: dict[str, int] = {}

    def set_device_memory(self, memory: int, size: int) -> None:
        self._memory_given = memory % HOST_ALIGNMENT == 0 and size >= self._engine.device_memory_size_v2

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile = profile_index
        return stream_handle == STREAM and profile_index < len(self._engine._plan["profiles"])

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self._engine._plan["profiles"][self._profile][name]
        if not all(low <= extent <= high for low, extent, high in zip(least, shape, most, strict=True)):
            return self._engine._logger._error(f"3: {name} of shape {shape} does not satisfy any profile")
        self._shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        fixed = self._engine._shape(name)
        return fixed if -1 not in fixed else self._engine._outputs_of(self._shapes)[name]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._values or memory == 0 or memory % HOST_ALIGNMENT:
            return self._engine._logger._error(f"3: address {memory:#x} of {name} is null or not aligned")
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Runs now, as a stream of its own would before anybody looks; or records, while a call is captured."""
        logger = self._engine._logger
        if stream_handle != STREAM or not self._memory_given:
            return logger._error("3: the stream or the activation memory is not set")
        if missing := self._engine._values.keys() - self._addresses.keys():
            return logger._error(f"3: no address is set for {sorted(missing)[0]}")
        shapes = {name: self.get_tensor_shape(name) for name in self._engine._values}
        places = dict(self._addresses)
        if (clash := self._clash(shapes)) is not None:
            return logger._error(f"3: an output lies over {clash}")
        if recording is None:
            self._run(shapes, places)
        else:
            recording.append(lambda: self._run(shapes, places))
        return True

    def _clash(self, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """Something that an output would overwrite."""
        ends = sorted(
            (start, start + math.prod(shapes[name]) * np.dtype(self._engine._numpy(name)).itemsize, name)
            for name, start in self._addresses.items()
            if math.prod(shapes[name])
        )
        for (_, end, first), (start, _, second) in itertools.pairwise(ends):
            if start < end and not {first, second} <= self._engine._inputs.keys():
                return f"{first} and {second}"
        return None

    def _run(self, shapes: Mapping[str, tuple[int, ...]], places: Mapping[str, int]) -> None:
        binding = self._engine._session.io_binding()
        for name, place in places.items():
            bind = binding.bind_input if name in self._engine._inputs else binding.bind_output
            bind(name, "cpu", 0, self._engine._type(name), shapes[name], place)
        self._engine._session.run_with_iobinding(binding)


def _creation_flags(version: str) -> Any:
    """The enumeration's numbers differ between major versions."""
    number = 1 if version.startswith("10.") else 0
    return enum.IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": number})


def tensorrt_module(version: str) -> Any:
    """The module as version `version` has it."""
    module: Any = ModuleType("tensorrt")
    module.__version__ = version
    module.__spec__ = ModuleSpec("tensorrt", None)  # libraries ask for it
    module.NetworkDefinitionCreationFlag = _creation_flags(version)
    for name, value in globals().items():
        if isinstance(value, type) and value.__module__ == __name__ and name != "HostDevice":
            versioned = value in (Builder, Runtime)
            setattr(module, name, type(name, (value,), {"version": version}) if versioned else value)
    return module


def install(monkeypatch: pytest.MonkeyPatch, version: str = "11.4.0.106") -> None:
    """From now on `import tensorrt` gives the stand-in."""
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_module(version))


class HostDevice:
    """The host's memory and processor in place of a GPU's."""

    torch_device = torch.device("cpu")
    gpu = "stand-in"
    compute_capability = "9.0"
    stream = STREAM

    def __init__(self, index: int = 0) -> None:
        self.captures = 0
        self.replays = 0

    def working(self) -> AbstractContextManager[None]:
        return nullcontext()

    def free_bytes(self) -> int:
        return 2**30

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        global recording
        recording = calls = []
        enqueue()
        recording = None
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            for call in calls:
                call()

        return replay
