"""A stand-in for the module `tensorrt_rtx`, to run engines: that for `tensorrt`, and what TensorRT-RTX has beside it.

It compiles for compute capabilities without a GPU, has no timing cache, and its engines finish a kernel for every new
profile and shape, which goes into a runtime cache that only the same version takes back
(`tests/export/test_tensorrt_api.py` compares names and arguments with the module that is installed).
"""

from __future__ import annotations

import enum
import sys
from typing import Any, ClassVar

import pytest

from tests.support import fake_tensorrt as plain

VERSION = "1.7.1.116"


class ComputeCapability(enum.Enum):
    SM80 = 80
    SM89 = 89
    SM120 = 120


class CudaGraphStrategy(enum.Enum):
    DISABLED = 0


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY = 0
    EAGER = 1


class IBuilderConfig(plain.IBuilderConfig):
    def __init__(self, version: str) -> None:
        super().__init__(version)
        self.num_compute_capabilities = 0
        self._capabilities: list[ComputeCapability] = []

    def set_compute_capability(self, compute_capability: ComputeCapability, index: int) -> bool:
        assert index == len(self._capabilities) < self.num_compute_capabilities
        self._capabilities.append(compute_capability)
        return True

    def _grow_cache(self) -> None:
        assert self._cache is None, "there is no timing cache"


class IRuntimeCache:
    def __init__(self) -> None:
        self._kernels: set[str] = set()

    def serialize(self) -> bytes:
        return "\n".join([VERSION, *sorted(self._kernels)]).encode()

    def deserialize(self, blob: bytes) -> bool:
        version, *kernels = blob.decode(errors="replace").split("\n")
        if version == VERSION:
            self._kernels |= set(kernels)
        return version == VERSION


class IRuntimeConfig:
    def __init__(self) -> None:
        self.cuda_graph_strategy: CudaGraphStrategy | None = None
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
        self._strategy = plain.ExecutionContextAllocationStrategy.STATIC
        self._cache: IRuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: plain.ExecutionContextAllocationStrategy) -> None:
        self._strategy = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache = cache
        return True


class IExecutionContext(plain.IExecutionContext):
    finished: ClassVar[list[str]] = []
    """Kernels that were not in a cache, of all engines."""

    def __init__(self, engine: Any, config: IRuntimeConfig) -> None:
        super().__init__(engine, config._strategy)
        assert config._cache is not None
        assert config.cuda_graph_strategy is CudaGraphStrategy.DISABLED, "the library would capture, too"
        strategy = config.dynamic_shapes_kernel_specialization_strategy
        assert strategy is DynamicShapesKernelSpecializationStrategy.EAGER, "a captured kernel would be replaced later"
        self._cache = config._cache

    def execute_async_v3(self, stream_handle: int) -> bool:
        kernel = f"{self._engine._plan['path']} {self._profile} {sorted(self._shapes.items())}"
        if kernel not in self._cache._kernels:
            assert plain.recording is None, "a kernel cannot be finished while a call is captured"
            self.finished.append(kernel)
            self._cache._kernels.add(kernel)
        return super().execute_async_v3(stream_handle)


class ICudaEngine(plain.ICudaEngine):
    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, runtime_config: IRuntimeConfig) -> IExecutionContext:
        self._contexts += 1
        return IExecutionContext(self, runtime_config)


def tensorrt_rtx_module() -> Any:
    """The module."""
    module = plain.tensorrt_module(VERSION)
    for name, value in globals().items():
        if isinstance(value, type) and value.__module__ == __name__:
            setattr(module, name, value)
    module.Builder._config = IBuilderConfig
    module.Runtime._engine = ICudaEngine
    return module


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on `import tensorrt_rtx` gives the stand-in."""
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", tensorrt_rtx_module())
