"""Operations and bytes of an ONNX graph, counted node by node, and the least time in which a machine can run it.

A multiplication with its addition counts as two operations. Only products count (MatMul, Gemm, Conv and the two
products of Attention), which are nearly all of a transformer's and a VAE's work; elementwise operators count only with
their bytes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference

from live_avatar.errors import InputError

Shape = tuple[int, ...]
EXTENT_OPERATORS: Mapping[str, Callable[..., Any]] = {
    "Squeeze": lambda x, *_: x.reshape(()),
    "Unsqueeze": lambda x, *_: x.reshape(1),
    "Reshape": lambda x, shape: x.reshape(shape),
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.floor_divide,
    "Concat": lambda *parts: np.concatenate(parts),
}
"""How a graph computes with one extent or a list of them."""
HALF_BYTES = (TensorProto.FLOAT4E2M1, TensorProto.INT4, TensorProto.UINT4)


@dataclass(frozen=True)
class Tensor:
    """Shape and size of one value of a graph."""

    shape: Shape
    bytes: int

    @classmethod
    def of(cls, shape: Shape, kind: int) -> Tensor:
        """kind: ONNX's number for the element type."""
        values = math.prod(shape)
        return cls(shape, -(-values // 2) if kind in HALF_BYTES else values * _item_bytes(kind))


@dataclass(frozen=True)
class Cost:
    """Cost of one run of a graph: operations by operator, and bytes.

    `least_bytes` go through memory even if all operators are fused: weights, inputs and outputs, each once.
    `unfused_bytes` are those of a run that writes every intermediate value and reads it back.
    """

    flops_by_operator: Mapping[str, int] = field(default_factory=dict)
    weight_bytes: int = 0
    input_bytes: int = 0
    output_bytes: int = 0
    unfused_bytes: int = 0

    @property
    def flops(self) -> int:
        return sum(self.flops_by_operator.values())

    @property
    def least_bytes(self) -> int:
        return self.weight_bytes + self.input_bytes + self.output_bytes

    @property
    def intensity(self) -> float:
        """Operations per byte, at best."""
        return self.flops / self.least_bytes

    @classmethod
    def combined(cls, *terms: tuple[int, Cost]) -> Cost:
        """The sum of the costs, each multiplied by its count."""
        flops: Counter[str] = Counter()
        for times, cost in terms:
            for operator, number in cost.flops_by_operator.items():
                flops[operator] += times * number
        names = ("weight_bytes", "input_bytes", "output_bytes", "unfused_bytes")
        sums = {name: sum(times * getattr(cost, name) for times, cost in terms) for name in names}
        return cls(dict(flops), **sums)


@dataclass(frozen=True)
class Ceilings:
    """A machine's peak rates: operations and bytes per second; `source` names their origin.

    operators: rates of single operators that are faster or slower than the rest.
    """

    name: str
    flops_per_s: float
    bytes_per_s: float
    source: str
    operators: Mapping[str, float] = field(default_factory=dict)

    def compute_s(self, cost: Cost) -> float:
        """Time for the operations alone."""
        rates = (
            (number, self.operators.get(name, self.flops_per_s)) for name, number in cost.flops_by_operator.items()
        )
        return sum(number / rate for number, rate in rates)

    def bound_s(self, cost: Cost) -> float:
        """Lower bound of the run's time: that of its operations or of its bytes, whichever is longer."""
        return max(self.compute_s(cost), cost.least_bytes / self.bytes_per_s)

    def limited_by(self, cost: Cost) -> str:
        return "operations" if self.compute_s(cost) >= cost.least_bytes / self.bytes_per_s else "bytes"


def count(model: ModelProto, inputs: Mapping[str, Shape]) -> Cost:
    """Cost of one run with inputs of these shapes; the weights' values may be absent.

    Raises `InputError` for an input without a shape, and for a product whose shapes cannot be inferred.
    """
    tensors = _tensors(model, inputs)
    weights = {value.name for value in model.graph.initializer}
    flops: Counter[str] = Counter()
    unfused = 0
    for node in model.graph.node:
        if node.op_type in FLOPS:
            flops[node.op_type] += FLOPS[node.op_type](node, tensors)
        unfused += sum(tensors[name].bytes for name in (*node.input, *node.output) if name in tensors)
    return Cost(
        dict(flops),
        weight_bytes=sum(tensors[name].bytes for name in weights),
        input_bytes=sum(tensors[value.name].bytes for value in model.graph.input if value.name not in weights),
        output_bytes=sum(tensors[value.name].bytes for value in model.graph.output if value.name in tensors),
        unfused_bytes=unfused,
    )


def _tensors(model: ModelProto, inputs: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Every value whose shape follows from the inputs'."""
    graph = _fixed(model, inputs).graph
    found = {value.name: Tensor.of(tuple(value.dims), value.data_type) for value in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
            found[value.name] = Tensor.of(tuple(d.dim_value for d in kind.shape.dim), kind.elem_type)
    return found


def _fixed(model: ModelProto, inputs: Mapping[str, Shape]) -> ModelProto:
    """A copy with these input shapes and the shapes inferred from them; the graph's own inner shapes are dropped."""
    fixed = ModelProto()
    fixed.CopyFrom(model)
    weights = {value.name for value in fixed.graph.initializer}
    for value in fixed.graph.input:
        if value.name in weights:
            continue
        if value.name not in inputs:
            raise InputError(f"input {value.name!r} has no shape here; give one of each of the graph's inputs.")
        kind = value.type.tensor_type.elem_type
        value.CopyFrom(helper.make_tensor_value_info(value.name, kind, inputs[value.name]))
    for value in fixed.graph.output:
        value.type.tensor_type.ClearField("shape")
    del fixed.graph.value_info[:]
    _fold_extents(fixed)
    return shape_inference.infer_shapes(fixed, data_prop=True)


def _fold_extents(model: ModelProto) -> None:
    """Replaces nodes that compute with the inputs' extents by their values: shape inference does not divide."""
    graph = model.graph
    shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in graph.input}
    values = {value.name: numpy_helper.to_array(value) for value in graph.initializer if _is_extent(value)}
    kept = []
    for node in graph.node:
        if node.op_type == "Shape" and node.input[0] in shapes:
            ends = {attribute.name: attribute.i for attribute in node.attribute}
            values[node.output[0]] = np.array(shapes[node.input[0]], np.int64)[ends.get("start", 0) : ends.get("end")]
        elif node.op_type in EXTENT_OPERATORS and all(name in values for name in node.input):
            values[node.output[0]] = EXTENT_OPERATORS[node.op_type](*(values[name] for name in node.input))
        else:
            kept.append(node)
            continue
        graph.initializer.append(numpy_helper.from_array(values[node.output[0]], node.output[0]))
    del graph.node[:]
    graph.node.extend(kept)


def _is_extent(value: TensorProto) -> bool:
    return value.data_type == TensorProto.INT64 and value.data_location != TensorProto.EXTERNAL and len(value.dims) < 2


def _item_bytes(kind: int) -> int:
    return int(helper.tensor_dtype_to_np_dtype(kind).itemsize)


# ---- Operations of one node


def _shape(node: NodeProto, tensors: Mapping[str, Tensor], name: str) -> Shape:
    if name not in tensors:
        raise InputError(
            f"the shape of {name!r} at {node.op_type} {node.name!r} does not follow from the inputs'; give concrete "
            "input shapes, and constants with their values."
        )
    return tensors[name].shape


def _matmul(node: NodeProto, tensors: Mapping[str, Tensor]) -> int:
    inner = _shape(node, tensors, node.input[0])[-1]
    return 2 * inner * math.prod(_shape(node, tensors, node.output[0]))


def _gemm(node: NodeProto, tensors: Mapping[str, Tensor]) -> int:
    rows, columns = _shape(node, tensors, node.input[0])
    inner = rows if _attribute(node, "transA", 0) else columns
    return 2 * inner * math.prod(_shape(node, tensors, node.output[0]))


def _conv(node: NodeProto, tensors: Mapping[str, Tensor]) -> int:
    """Weights are [out, in / group, *kernel]: each output element is a product with all but the first dimension."""
    kernel = _shape(node, tensors, node.input[1])[1:]
    return 2 * math.prod(kernel) * math.prod(_shape(node, tensors, node.output[0]))


def _attention(node: NodeProto, tensors: Mapping[str, Tensor]) -> int:
    """Queries with keys, and weights with values, of [batch, heads, tokens, width]; masks do not reduce it."""
    queries, keys, values = (_shape(node, tensors, name) for name in node.input[:3])
    if len(queries) != 4:
        raise InputError(f"Attention {node.name!r} has queries {queries}; expected [batch, heads, tokens, width].")
    batch, heads, tokens, width = queries
    return 2 * batch * heads * tokens * keys[-2] * (width + values[-1])


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else helper.get_attribute_value(found)


FLOPS: Mapping[str, Callable[[NodeProto, Mapping[str, Tensor]], int]] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "Attention": _attention,
}


def load_graph(path: str) -> ModelProto:
    """A graph without the values in external files."""
    return onnx.load(path, load_external_data=False)
