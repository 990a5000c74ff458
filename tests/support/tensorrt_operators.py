"""Whether TensorRT's parser reads a graph: its operators, their types and ranks against the published list."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from live_avatar.exporter.tracing import OPSET

LIST = json.loads((Path(__file__).parents[1] / "export" / "data" / "tensorrt_operators.json").read_text())
TYPES = {1: "FP32", 10: "FP16", 16: "BF16", 6: "INT32", 7: "INT64", 2: "UINT8", 9: "BOOL", 11: "DOUBLE", 17: "FP8"}
TWO_TYPES = ("Cast", "ConstantOfShape")  # what they give is a type of its own


@dataclass(frozen=True)
class Graph:
    """A graph with the type and the rank of every value."""

    name: str
    proto: onnx.GraphProto
    types: Mapping[str, str]
    ranks: Mapping[str, int]
    constants: frozenset[str]

    @classmethod
    def of(cls, name: str, model: onnx.ModelProto) -> Graph:
        graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
        values = [*graph.input, *graph.output, *graph.value_info]
        types = {value.name: TYPES[value.type.tensor_type.elem_type] for value in values}
        ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in values}
        types |= {tensor.name: TYPES[tensor.data_type] for tensor in graph.initializer}
        ranks |= {tensor.name: len(tensor.dims) for tensor in graph.initializer}
        constants = frozenset(tensor.name for tensor in graph.initializer)
        return cls(name, graph, types, ranks, constants)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def attention(graph: Graph, node: onnx.NodeProto) -> bool:
    given = attributes(node)
    return (
        all(graph.ranks[name] == 4 for name in node.input if name)
        and len([name for name in node.input if name]) <= 4
        and len(node.output) == 1
        and given.get("softcap", 0) == 0
        and given.get("qk_matmul_output_mode", 0) == 0
        and "softmax_precision" not in given
    )


def first_output_only(graph: Graph, node: onnx.NodeProto) -> bool:
    return len(node.output) == 1


def constant_axes(graph: Graph, node: onnx.NodeProto) -> bool:
    """Axes are an initializer; `Squeeze` may have none, and then takes those of length 1."""
    return len(node.input) < 2 or node.input[1] in graph.constants


def no_special_constant(graph: Graph, node: onnx.NodeProto) -> bool:
    return not attributes(node).keys() & {"sparse_value", "value_string", "value_strings"}


def no_zero_point(graph: Graph, node: onnx.NodeProto) -> bool:
    """One of 0 would be allowed, too; nothing here writes it."""
    return len(node.input) < 3


RULES: Mapping[str, Callable[[Graph, onnx.NodeProto], bool]] = {
    "Attention": attention,
    "Constant": no_special_constant,
    "DequantizeLinear": no_zero_point,
    "LayerNormalization": first_output_only,
    "QuantizeLinear": no_zero_point,
    "ReduceL2": constant_axes,
    "ReduceMean": constant_axes,
    "ReduceSum": constant_axes,
    "Squeeze": constant_axes,
    "Unsqueeze": constant_axes,
}


def typed_values(node: onnx.NodeProto) -> Iterator[str]:
    """Names of the inputs and outputs that have the operator's own type."""
    schema = onnx.defs.get_schema(node.op_type, OPSET)
    own = schema.inputs[0].type_str
    for names, formals in ((node.input, schema.inputs), (node.output, schema.outputs)):
        for index, name in enumerate(names):
            if name and formals[min(index, len(formals) - 1)].type_str == own:
                yield name
    if node.op_type in TWO_TYPES:
        yield node.output[0]


def faults(graph: Graph) -> Iterator[str]:
    """What TensorRT would not read, as sentences."""
    ends = {value.name for value in (*graph.proto.input, *graph.proto.output)}
    for node in graph.proto.node:
        place = f"{graph.name}: {node.op_type} {node.name}"
        if node.domain or node.op_type not in LIST["types"]:
            yield f"{place} is not in the list"
            continue
        allowed = LIST["types"][node.op_type].split()
        yield from (
            f"{place} has {graph.types[name]}, the list has {allowed}"
            for name in typed_values(node)
            if graph.types[name] not in allowed
        )
        if node.op_type in LIST["restrictions"]:
            rule = RULES.get(node.op_type)
            if rule is None or not rule(graph, node):
                yield f"{place} breaks (or nothing here checks): {LIST['restrictions'][node.op_type]}"
        yield from (
            f"{place} has UINT8 inside the graph, where TensorRT has none"
            for name in (*node.input, *node.output)
            if name and graph.types[name] == "UINT8" and name not in ends
        )
        made, source = graph.types[node.output[0]], graph.types[node.input[0]] if node.input else ""
        if made == "UINT8" and source not in ("FP32", "FP16"):
            yield f"{place} makes UINT8 of {source}, which must be FP32 or FP16"
