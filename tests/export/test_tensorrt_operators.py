"""Every operator of every graph in float32, with its types, is one that the parser of plain TensorRT reads.

Graphs in 16 bits and in FP8 are read by NVIDIA's own parser, that of TensorRT-RTX (`test_compiler.py`).
The list is `data/tensorrt_operators.json`, which names its source. The types checked are those of the operator's
first type variable in the ONNX standard (an index or a shape has a type of its own), and both of a cast's.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import pytest

from live_avatar.exporter.tracing import OPSET
from live_avatar.graphs.artifacts import Artifacts
from tests.support.tensorrt_operators import LIST, Graph, faults


def test_the_opset_is_one_that_tensorrt_reads() -> None:
    least, most = LIST["opsets"]
    assert least <= OPSET <= most


def test_every_exported_graph_is_readable(artifacts: Artifacts) -> None:
    graphs = [
        Graph.of(name, onnx.load(artifacts.graph_path(name), load_external_data=False)) for name in artifacts.contracts
    ]
    assert [fault for graph in graphs for fault in faults(graph)] == []
    assert {"Attention", "Conv", "Cast"} <= {node.op_type for graph in graphs for node in graph.proto.node}


def node_model(node: onnx.NodeProto, inputs: Mapping[str, tuple[int, list[int]]], output: int) -> onnx.ModelProto:
    """A graph of one node; inputs by name as (type, shape)."""
    values = [onnx.helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    outputs = [onnx.helper.make_tensor_value_info(name, output, None) for name in node.output[:1]]
    graph = onnx.helper.make_graph([node], "one", values, outputs)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)])


QKV = {name: (1, [1, 2, 4, 8]) for name in ("q", "k", "v")}
UNREADABLE = {
    "softcap": node_model(onnx.helper.make_node("Attention", ["q", "k", "v"], ["y"], softcap=2.0), QKV, 1),
    "flat": node_model(
        onnx.helper.make_node("Attention", ["q", "k", "v"], ["y"], q_num_heads=2, kv_num_heads=2),
        {name: (1, [1, 4, 16]) for name in ("q", "k", "v")},
        1,
    ),
    "past": node_model(
        onnx.helper.make_node("Attention", ["q", "k", "v", "", "pk", "pv"], ["y", "nk", "nv"]),
        {**QKV, "pk": (1, [1, 2, 3, 8]), "pv": (1, [1, 2, 3, 8])},
        1,
    ),
    "unknown": node_model(onnx.helper.make_node("Det", ["x"], ["y"]), {"x": (1, [2, 2])}, 1),
    "type": node_model(onnx.helper.make_node("Sigmoid", ["x"], ["y"]), {"x": (11, [2])}, 11),
    "axes": node_model(onnx.helper.make_node("ReduceMean", ["x", "a"], ["y"]), {"x": (1, [2, 2]), "a": (7, [1])}, 1),
    "bytes": node_model(onnx.helper.make_node("Cast", ["x"], ["y"], to=2), {"x": (7, [2])}, 2),
    "unchecked": node_model(onnx.helper.make_node("CumSum", ["x", "a"], ["y"]), {"x": (1, [2]), "a": (7, [])}, 1),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_found(name: str) -> None:
    assert list(faults(Graph.of(name, UNREADABLE[name]))) != []
