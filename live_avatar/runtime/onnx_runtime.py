"""Artifacts on ONNX Runtime: the embedded default on CPUs.

Every process and every test uses the same session options, one thread included, so that two runs of a
graph give the same bits wherever they happen. Needs no torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime

from live_avatar.arrays import Array, Arrays
from live_avatar.errors import ArtifactError
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.graphs.contract import Contract, Extent
from live_avatar.graphs.memory import host_available_bytes
from live_avatar.runtime.host import host_zeros, numpy_dtype
from live_avatar.runtime.tokenizer import verified_tokenizer

FP8 = numpy_dtype("float8_e4m3fn")
FP8_IN_ONNX = 17
"""`TensorProto.FLOAT8E4M3FN`, without the package onnx, which serving does not need."""


class OnnxGraph:
    """One graph file in an ONNX Runtime session on the CPU."""

    def __init__(self, path: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_quant_qdq", "1")  # it would make INT8 operators of FP8
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own exceptions have no common root
            raise ArtifactError(f"{path} cannot be loaded ({error}); export it again.") from error
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Arrays) -> dict[str, Array]:
        results = self._session.run(self._outputs, {name: feed_value(array) for name, array in inputs.items()})
        return dict(zip(self._outputs, results, strict=True))


def feed_value(array: Array) -> Any:
    """An input as ONNX Runtime takes it: numpy's own types as they are, e4m3fn as bytes with the name of the type."""
    if array.dtype != FP8:
        return array
    bits = np.ascontiguousarray(array).view(np.uint8)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, FP8_IN_ONNX)


class OnnxRuntime:
    """The graphs of an artifacts folder. With `warm` each has run once when it is given out: the first run of a graph
    pays for the memory that all runs use."""

    zeros = staticmethod(host_zeros)
    free_bytes = staticmethod(host_available_bytes)

    def __init__(self, artifacts: Artifacts, warm: bool = False) -> None:
        """Raises `ArtifactError` for a precision that ONNX Runtime's CPU kernels do not have."""
        if artifacts.preset.precision == "bfloat16":
            raise ArtifactError(
                f"{artifacts.folder} is in bfloat16, which ONNX Runtime does not run on a CPU; export it with "
                "--precision float32, or serve it with a GPU profile."
            )
        self.preset = artifacts.preset
        self.tokenizer = verified_tokenizer(artifacts)
        self._artifacts = artifacts
        self._warm = warm

    def modulation(self, step: int) -> dict[str, Array]:
        return self._artifacts.modulation(step)

    def graph(self, component: str) -> OnnxGraph:
        """Loads the component's graph. Raises `ArtifactError` for one whose files are not those of the manifest."""
        with self._artifacts.reading(component) as path:
            graph = OnnxGraph(str(path))
        if self._warm:
            contract = self._artifacts.contracts[component]
            for profile in contract.profiles or (None,):
                graph.run(_usual_inputs(contract, profile))
        return graph


def _usual_inputs(contract: Contract, profile: str | None) -> dict[str, Array]:
    """Ones of the usual shapes: masks that hide nothing, token ids that exist."""
    shapes = {spec: contract.shape(spec, Extent.OPT, profile) for spec in contract.inputs}
    return {spec.name: np.ones(shape, numpy_dtype(spec.dtype)) for spec, shape in shapes.items()}
