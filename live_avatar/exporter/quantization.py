"""The transformer's large linears in FP8: explicit QuantizeLinear and DequantizeLinear in a traced graph.

Per quantized linear the graph becomes

    input -> QuantizeLinear -> DequantizeLinear -> MatMul <- DequantizeLinear <- weight as e4m3fn [in, out]

of which TensorRT-RTX makes one FP8 product (docs/log.md; it was compiled here, not run). The scales of both are one
number per tensor: a weight's follows from the weight, an input's from a calibration (`export/calibrate.py`). The weight
stands transposed and the scales have the type of the graph's activations, so that nothing comes between
DequantizeLinear and MatMul, as NVIDIA's ModelOpt 0.47 has it.

With `DynamicScaling` each token has a scale of its own, computed in every run. QuantizeLinear and DequantizeLinear have
the scale 1 then, the input is divided before, and the product is multiplied after:

    input / scale -> QuantizeLinear -> DequantizeLinear -> MatMul <- ... , then * scale

A computed scale given to QuantizeLinear itself compiles, but to a product of 16 bits.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from live_avatar.errors import ExportError
from live_avatar.exporter.tracing import TracedGraph
from live_avatar.graphs.contract import DIT, TEXT
from live_avatar.json_files import read_json
from live_avatar.model.linears import is_fp8_weight
from live_avatar.weights.fp8 import MAX_E4M3, MAX_QUANT_SCALE, quant_scale, saturate
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


@dataclass(frozen=True)
class DynamicScaling:
    """Scales of inputs are computed in every run, one per token, by the rule of the released code, whose scale is one
    per call. Nothing is calibrated."""


Scaling = Calibration | DynamicScaling
"""Where the scales of the linears' inputs come from."""

DYNAMIC = "dynamic"


def read_scaling(value: str) -> Scaling:
    """`DYNAMIC`, or a calibration's file. Raises `ExportError` if it is neither."""
    return DynamicScaling() if value == DYNAMIC else Calibration.read(Path(value))


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


def quantize_checkpoint(checkpoint: Checkpoint, scaling: Scaling) -> Checkpoint:
    """The checkpoint with `QuantizedWeights` for the transformer, to write quantized graphs from.

    Raises `ExportError` if the calibration is of another preset.
    """
    if isinstance(scaling, Calibration) and scaling.preset != checkpoint.preset.name:
        raise ExportError(
            f"the calibration is of preset {scaling.preset}, expected {checkpoint.preset.name}; calibrate that one "
            "with python -m export.calibrate."
        )
    return dataclasses.replace(checkpoint, parts={**checkpoint.parts, "dit": QuantizedWeights(checkpoint.parts["dit"])})


def quantize_graph(graph: TracedGraph, component: str, scaling: Scaling) -> TracedGraph:
    """The graph of a component with its quantized linears; the static scales of their inputs are among its constants.

    The model is changed in place. Raises `ExportError` for a linear that was not calibrated, or is not a Transpose and
    a MatMul.
    """
    initializers = graph.model.graph.initializers
    quantized = _static_input if isinstance(scaling, Calibration) else _dynamic_input
    inputs: dict[ir.Value, _Input] = {}
    for name, value in graph.weights:
        if name.startswith(PART) and is_fp8_weight(name.removeprefix(PART)):
            _quantize_linear(graph.model.graph, name.removesuffix(WEIGHT), value, inputs, quantized)
    graph.model.graph.sort()  # a shared input may be quantized before a linear that comes late
    scales = {name: value for name, value in initializers.items() if name.endswith((WEIGHT_SCALE, INPUT_SCALE))}
    known = scaling.amax.get(component, {}) if isinstance(scaling, Calibration) else {}
    constants = {
        name: _input_scale(name, component, known, value)
        for name, value in scales.items()
        if name.endswith(INPUT_SCALE)
    }
    return TracedGraph(graph.model, [*graph.weights, *scales.items()], {**graph.constants, **constants})


@dataclass(frozen=True)
class _Input:
    """The e4m3fn numbers of a linear's input, the scale of its DequantizeLinear, and what the product is multiplied by,
    if anything."""

    numbers: ir.Value
    scale: ir.Value
    factor: ir.Value | None = None


def _quantize_linear(
    graph: ir.Graph,
    linear: str,
    value: ir.Value,
    inputs: dict[ir.Value, _Input],
    quantized: Callable[[ir.Graph, str, ir.Node, ir.Value, ir.DataType], _Input],
) -> None:
    """Changes one linear; `inputs` has those that were met before, since linears may share theirs."""
    transpose, matmul = _consumers(linear, value)
    source, dtype = matmul.inputs[0], value.dtype
    assert source is not None
    assert dtype is not None
    if source not in inputs:
        inputs[source] = quantized(graph, linear, matmul, source, dtype)
    given = inputs[source]
    matmul.replace_input_with(0, _dequantized(graph, matmul, given.numbers, given.scale))
    matmul.replace_input_with(1, _dequantized(graph, matmul, value, _scalar(graph, linear + WEIGHT_SCALE, dtype)))
    if given.factor is not None:
        product = matmul.outputs[0]
        scaled = ir.node("Mul", [product, given.factor])
        ir.convenience.replace_all_uses_with(product, scaled.outputs[0])
        scaled.replace_input_with(0, product)
        graph.insert_after(matmul, scaled)
    graph.remove(transpose, safe=True)
    value.dtype, value.shape = ir.DataType.FLOAT8E4M3FN, ir.Shape(tuple(value.shape or ())[::-1])


def _static_input(graph: ir.Graph, linear: str, matmul: ir.Node, source: ir.Value, dtype: ir.DataType) -> _Input:
    scale = _scalar(graph, linear + INPUT_SCALE, dtype)
    return _Input(_numbers(graph, matmul, source, scale), scale)


def _dynamic_input(graph: ir.Graph, linear: str, matmul: ir.Node, source: ir.Value, dtype: ir.DataType) -> _Input:
    """[..., in] has the scales [..., 1]: max |x| / 448, and at least 1 / 448 (`weights.fp8.quant_scale`)."""
    largest, least = _constant(graph, MAX_E4M3, dtype), _constant(graph, 1 / MAX_QUANT_SCALE, dtype)
    unit, axes = _constant(graph, 1.0, dtype), _constant(graph, [-1], ir.DataType.INT64)
    value = source
    for operator, others in (("Abs", []), ("ReduceMax", [axes]), ("Div", [largest]), ("Max", [least])):
        node = ir.node(operator, [value, *others])
        graph.insert_before(matmul, node)
        value = node.outputs[0]
    divided = ir.node("Div", [source, value])
    graph.insert_before(matmul, divided)
    return _Input(_numbers(graph, matmul, divided.outputs[0], unit), unit, factor=value)


def _numbers(graph: ir.Graph, matmul: ir.Node, source: ir.Value, scale: ir.Value) -> ir.Value:
    node = ir.node("QuantizeLinear", [source, scale], {"output_dtype": ir.DataType.FLOAT8E4M3FN.value})
    graph.insert_before(matmul, node)
    return node.outputs[0]


def _constant(graph: ir.Graph, number: float | Sequence[int], dtype: ir.DataType) -> ir.Value:
    """An initializer with its value; equal ones are one."""
    name = f"fp8_{dtype.name}_{number}"
    if name not in graph.initializers:
        array = np.array(number, dtype=dtype.numpy())
        graph.initializers[name] = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(dtype),
            const_value=ir.tensor(array, dtype, name=name),
        )
    return graph.initializers[name]


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


def _dequantized(graph: ir.Graph, consumer: ir.Node, numbers: ir.Value, scale: ir.Value) -> ir.Value:
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
