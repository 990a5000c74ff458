"""Every operator of every graph, with its types, is one that TensorRT's parser reads.

The list is `data/tensorrt_operators.json`, which names its source. The types checked are those of the operator's
first type variable in the ONNX standard (an index or a shape has a type of its own), and both of a cast's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import onnx
import onnx_ir as ir
import pytest

from live_avatar.config import S2V_14B, Preset
from live_avatar.exporter.tracing import OPSET, Tracer
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.graphs.components import build_components
from live_avatar.graphs.contract import contracts
from live_avatar.model.networks import meta_networks
from tests.export.conftest import LEAST
from tests.support.tensorrt_operators import LIST, Graph, faults


def traced(preset: Preset) -> Iterator[Graph]:
    """Graphs without weights in memory or on disk."""
    tracer = Tracer(build_components(preset, meta_networks(preset)))
    for name, contract in contracts(preset).items():
        graph = tracer.trace(contract)
        for _, value in graph.weights:
            value.const_value = ir.ExternalTensor("absent", 0, 0, value.dtype, shape=value.shape, name=value.name)
        yield Graph.of(name, ir.to_proto(graph.model))


def test_the_opset_is_one_that_tensorrt_reads() -> None:
    least, most = LIST["opsets"]
    assert least <= OPSET <= most


def test_every_exported_graph_is_readable(artifacts: Artifacts) -> None:
    graphs = [
        Graph.of(name, onnx.load(artifacts.graph_path(name), load_external_data=False)) for name in artifacts.contracts
    ]
    assert [fault for graph in graphs for fault in faults(graph)] == []
    assert {"Attention", "Conv", "Cast"} <= {node.op_type for graph in graphs for node in graph.proto.node}


@pytest.mark.slow
def test_every_graph_in_bfloat16_is_readable() -> None:
    graphs = list(traced(LEAST.with_precision("bfloat16")))
    assert [fault for graph in graphs for fault in faults(graph)] == []
    assert {"BF16"} <= {kind for graph in graphs for kind in graph.types.values()}


@pytest.mark.slow
def test_every_graph_of_the_large_model_is_readable() -> None:
    """Full widths and picture, two layers; nothing in a graph depends on the number of layers but its length."""
    full = S2V_14B.with_precision("bfloat16")
    cut = replace(
        full,
        dit=replace(full.dit, num_layers=2, audio_inject_layers=(0,), audio_states=2),
        speech=replace(full.speech, num_hidden_layers=1),
        text=replace(full.text, num_layers=1),
    ).with_stream(steps=1, sink_update_block=2)
    assert [fault for graph in traced(cut) for fault in faults(graph)] == []


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
