"""The transformer's large linears in FP8: explicit QuantizeLinear and DequantizeLinear in a traced graph.

Per quantized linear the graph becomes

    input -> QuantizeLinear -> DequantizeLinear -> MatMul <- DequantizeLinear <- weight as e4m3fn [in, out]

the form of which TensorRT is said to make one FP8 product (nobody ran it here). Scales are one number per tensor, on
both sides: NVIDIA reports that a scale per channel with one per token falls back to 16 bits (TensorRT-Model-Connect
pull request 1386). They are constants: a weight's follows from the weight, an input's from a calibration
(`export/calibrate.py`). The weight stands transposed and the scales have the type of the graph's activations, so that
nothing comes between DequantizeLinear and MatMul, as NVIDIA's ModelOpt 0.47 has it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from live_avatar.errors import ExportError
from live_avatar.exporter.tracing import TracedGraph
from live_avatar.graphs.contract import DIT, TEXT
from live_avatar.json_files import read_json
from live_avatar.model.linears import is_fp8_weight
from live_avatar.weights.fp8 import quant_scale, saturate
from live_avatar.weights.tensors import Checkpoint, Shapes, Weights

WEIGHT, WEIGHT_SCALE, INPUT_SCALE = ".weight", ".weight_scale", ".input_scale"
PART = "dit."
QUANTIZED = (DIT, TEXT)
"""Components that have quantized linears."""
HEADROOM = 2.0
"""How far beyond the largest calibrated input an input may go before it saturates. It costs next to nothing: numbers of
floating point are as precise under a larger scale, but for those below 2^-6 scales, where e4m3fn has no more exponents.
"""


@dataclass(frozen=True)
class Calibration:
    """The largest absolute input of every quantized linear (`dit.` and its name), by component, on real streams."""

    preset: str
    blocks: int
    amax: Mapping[str, Mapping[str, float]]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """Raises `ExportError` if the file is not a calibration."""
        try:
            values = read_json(path)
            amax = {
                str(component): {str(linear): float(value) for linear, value in inputs.items()}
                for component, inputs in values["amax"].items()
            }
            wrong = [value for inputs in amax.values() for value in inputs.values() if not 0 <= value < math.inf]
            if wrong:
                raise ValueError(f"a largest input is {wrong[0]}, expected a number of at least 0")
            return cls(str(values["preset"]), int(values["blocks"]), amax)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ExportError(
                f"{path} is not a calibration ({error}); make one with python -m export.calibrate."
            ) from error


def static_scale(amax: Tensor) -> Tensor:
    """Dequantization scale of a tensor with largest absolute value `amax`; float32, shape of `amax`.

    That of the released code, rounded up to a number of bfloat16: so it is the same number in a graph of any type, and
    nothing saturates by the rounding.
    """
    exact = (1 / quant_scale(amax)).contiguous()
    return ((exact.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)


def quantize_weight(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A linear's weight [out, in] -> e4m3fn [in, out], and its scale, a float32 scalar."""
    scale = static_scale(tensor.abs().max())
    return saturate(tensor.float() / scale).t().contiguous(), scale


class QuantizedWeights:
    """The transformer's weights as its quantized graphs take them: e4m3fn [in, out], and a scale beside each."""

    def __init__(self, stored: Weights) -> None:
        self.origin = stored.origin
        self.files: Sequence[Path] = stored.files
        self._stored = stored
        self._scales: dict[str, Tensor] = {}

    def shapes(self) -> Shapes:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in self._stored.shapes().items():
            chosen = is_fp8_weight(name)
            shapes[name] = shape[::-1] if chosen else shape
            if chosen:
                shapes[_scale_of(name)] = ()
        return shapes

    def read(self, name: str) -> Tensor:
        if name.endswith(WEIGHT_SCALE):
            if name not in self._scales:
                self.read(name.removesuffix(WEIGHT_SCALE) + WEIGHT)
            return self._scales[name]
        tensor = self._stored.read(name)
        if not is_fp8_weight(name):
            return tensor
        numbers, self._scales[_scale_of(name)] = quantize_weight(tensor)
        return numbers


def _scale_of(name: str) -> str:
    return name.removesuffix(WEIGHT) + WEIGHT_SCALE


def quantize_checkpoint(checkpoint: Checkpoint, calibration: Calibration) -> Checkpoint:
    """The checkpoint with `QuantizedWeights` for the transformer, to write quantized graphs from.

    Raises `ExportError` if the calibration is of another preset.
    """
    if calibration.preset != checkpoint.preset.name:
        raise ExportError(
            f"the calibration is of preset {calibration.preset}, expected {checkpoint.preset.name}; calibrate that one "
            "with python -m export.calibrate."
        )
    return dataclasses.replace(checkpoint, parts={**checkpoint.parts, "dit": QuantizedWeights(checkpoint.parts["dit"])})


def quantize_graph(graph: TracedGraph, component: str, calibration: Calibration) -> TracedGraph:
    """The graph of a component with its quantized linears; the scales of their inputs are among its constants.

    The model is changed in place. Raises `ExportError` for a linear that was not calibrated, or is not a Transpose and
    a MatMul.
    """
    initializers = graph.model.graph.initializers
    inputs: dict[ir.Value, ir.Value] = {}
    for name, value in graph.weights:
        if name.startswith(PART) and is_fp8_weight(name.removeprefix(PART)):
            _quantize_linear(graph.model.graph, name.removesuffix(WEIGHT), value, inputs)
    graph.model.graph.sort()  # a shared input may be quantized before a linear that comes late
    scales = {name: value for name, value in initializers.items() if name.endswith((WEIGHT_SCALE, INPUT_SCALE))}
    known = calibration.amax.get(component, {})
    constants = {
        name: _input_scale(name, component, known, value)
        for name, value in scales.items()
        if name.endswith(INPUT_SCALE)
    }
    return TracedGraph(graph.model, [*graph.weights, *scales.items()], {**graph.constants, **constants})


def _quantize_linear(graph: ir.Graph, linear: str, value: ir.Value, inputs: dict[ir.Value, ir.Value]) -> None:
    """Changes one linear; `inputs` has the e4m3fn numbers of inputs met before, since linears may share theirs."""
    transpose, matmul = _consumers(linear, value)
    source, dtype = matmul.inputs[0], value.dtype
    assert source is not None
    assert dtype is not None
    if source not in inputs:
        scale = _scalar(graph, linear + INPUT_SCALE, dtype)
        made = ir.node("QuantizeLinear", [source, scale], {"output_dtype": ir.DataType.FLOAT8E4M3FN.value})
        graph.insert_before(matmul, made)
        inputs[source] = made.outputs[0]
    quantizer = inputs[source].producer()
    assert quantizer is not None
    matmul.replace_input_with(0, _dequantized(graph, matmul, inputs[source], quantizer.inputs[1]))
    matmul.replace_input_with(1, _dequantized(graph, matmul, value, _scalar(graph, linear + WEIGHT_SCALE, dtype)))
    graph.remove(transpose, safe=True)
    value.dtype, value.shape = ir.DataType.FLOAT8E4M3FN, ir.Shape(tuple(value.shape or ())[::-1])


def _consumers(linear: str, value: ir.Value) -> tuple[ir.Node, ir.Node]:
    """The nodes Transpose and MatMul of a linear."""
    found = [use.node for use in value.uses()]
    found += [use.node for node in found for use in node.outputs[0].uses()]
    if [node.op_type for node in found] != ["Transpose", "MatMul"]:
        raise ExportError(
            f"{linear} is made of {', '.join(node.op_type for node in found)}, expected Transpose, MatMul; "
            "leave it out of the FP8 recipe."
        )
    return found[0], found[1]


def _scalar(graph: ir.Graph, name: str, dtype: ir.DataType) -> ir.Value:
    """A new initializer without a value."""
    value = ir.Value(name=name, shape=ir.Shape(()), type=ir.TensorType(dtype))
    graph.initializers[name] = value
    return value


def _dequantized(graph: ir.Graph, consumer: ir.Node, numbers: ir.Value, scale: ir.Value | None) -> ir.Value:
    """A node of each consumer's own, so that every MatMul has one between itself and the numbers."""
    node = ir.node("DequantizeLinear", [numbers, scale])
    graph.insert_before(consumer, node)
    return node.outputs[0]


def _input_scale(name: str, component: str, amax: Mapping[str, float], value: ir.Value) -> Tensor:
    """Linears that share an input share the scale of the first of them."""
    linear = name.removesuffix(INPUT_SCALE)
    if linear not in amax:
        raise ExportError(
            f"{component}: the calibration has no input of {linear}, expected one per quantized linear; calibrate this "
            "preset again with python -m export.calibrate."
        )
    assert value.dtype is not None
    return static_scale(torch.tensor(HEADROOM * amax[linear])).to(getattr(torch, str(value.dtype.numpy())))
