"""Every graph of the tiny preset keeps its contract, and a graph that does not is refused."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from live_avatar.config import S2V_14B, TINY
from live_avatar.errors import ExportError
from live_avatar.exporter.tracing import OPSET, Tracer, random_inputs
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.graphs.components import TextEncoder
from live_avatar.graphs.contract import DIT, FLOAT, INT64, SINK, Contract, Extent, GraphTensor, contracts
from live_avatar.model.networks import meta_networks

COMPONENTS = list(contracts(TINY))
ROOT = Path(__file__).parents[2]


def graph_of(artifacts: Artifacts, component: str) -> onnx.ModelProto:
    return onnx.load(artifacts.graph_path(component), load_external_data=False)


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_graph_is_of_opset_23_and_of_the_standard_domain_alone(artifacts: Artifacts, component: str) -> None:
    model = graph_of(artifacts, component)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 23)]
    assert OPSET == 23
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert len(model.functions) == 0


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_graph_has_its_contracts_names_types_and_shapes(artifacts: Artifacts, component: str) -> None:
    model, contract = graph_of(artifacts, component), contracts(TINY)[component]
    for values, specs in ((model.graph.input, contract.inputs), (model.graph.output, contract.outputs)):
        assert [value.name for value in values] == [spec.name for spec in specs]
        for value, spec in zip(values, specs, strict=True):
            tensor = value.type.tensor_type
            assert onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type) == np.dtype(spec.dtype), spec.name
            dims = tuple(d.dim_param if d.HasField("dim_param") else d.dim_value for d in tensor.shape.dim)
            assert dims == spec.shape, spec.name


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_graph_holds_no_path_and_no_stack_trace(artifacts: Artifacts, component: str) -> None:
    data = artifacts.graph_path(component).read_bytes()
    for word in (str(ROOT), sys.prefix, str(Path.home()), "site-packages", ".py", "Traceback", "stack_trace"):
        assert word.encode() not in data, word
    model = graph_of(artifacts, component)
    assert not model.doc_string
    assert not model.metadata_props


def test_there_is_one_transformer(artifacts: Artifacts) -> None:
    """Other graphs have none of its layers but for the keys and values of the text."""
    layers = re.compile(r"^dit\.blocks\.\d+\.(?!cross_attn\.(k|v|norm_k)\.)")
    holders = {
        component
        for component in artifacts.contracts
        for tensor in graph_of(artifacts, component).graph.initializer
        if layers.match(tensor.name)
    }
    assert holders == {DIT}


def test_random_inputs_follow_seed_and_extent() -> None:
    contract = contracts(TINY)[DIT]
    one, again, other = (random_inputs(contract, seed, Extent.MIN) for seed in (1, 1, 2))
    assert np.array_equal(one["tokens"], again["tokens"])
    assert not np.array_equal(one["tokens"], other["tokens"])
    lengths = [random_inputs(contract, 1, extent)["history_k.0"].shape[2] for extent in Extent]
    assert lengths == [0, 324, 324]
    assert random_inputs(contract, 1, Extent.MAX, SINK)["sink_k.0"].shape[2] == 0


class Scaled(nn.Module):
    """[1, n] -> [1, n]."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def traced(module: nn.Module, contract: Contract) -> ir.Model:
    return Tracer({contract.name: module}).trace(contract).model


def spec(name: str, shape: tuple[int | str, ...] = (1, 4), dtype: str = FLOAT) -> GraphTensor:
    return GraphTensor(name, dtype, shape)


class TwoOutputs(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x.to(torch.int64)


BROKEN: list[tuple[nn.Module, Contract, str]] = [
    (
        Scaled(),
        Contract("scaled", (spec("x"),), (spec("y", (1, 5)),)),
        r"scaled: y has shape \[1, 4\], expected \(1, 5\)\.",
    ),
    (
        Scaled(),
        Contract("scaled", (spec("x"),), (spec("y", (4,)),)),
        r"scaled: y has shape \[1, 4\], expected \(4,\)\.",
    ),
    (
        Scaled(),
        Contract("scaled", (spec("x"),), (spec("y", dtype=INT64),)),
        r"scaled: y is float32, expected int64\.",
    ),
    (
        TwoOutputs(),
        Contract("two", (spec("x"),), (spec("y"),)),
        r"two: outputs are \['y', .*\], expected \['y'\]\.",
    ),
]


@pytest.mark.parametrize(("module", "contract", "message"), BROKEN, ids=["dimension", "rank", "type", "surplus output"])
def test_a_graph_that_breaks_its_contract_is_refused(module: nn.Module, contract: Contract, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        traced(module, contract)


def test_symbolic_dimensions_get_the_contracts_names() -> None:
    sizes = {"any": {"length": (2, 4, 8)}}
    model = traced(Scaled(), Contract("scaled", (spec("x", (1, "length")),), (spec("y", (1, "length")),), sizes))
    for value in (model.graph.inputs[0], model.graph.outputs[0]):
        assert [str(dim) for dim in value.shape or ()] == ["1", "length"]
    assert not any(node.doc_string or node.metadata_props for node in model.graph)


def test_a_size_that_is_fixed_where_the_contract_has_a_symbol_is_refused() -> None:
    with pytest.raises(ExportError, match=r"scaled: y has shape \[1, 4\], expected \(1, 'length'\)\."):
        traced(Scaled(), Contract("scaled", (spec("x"),), (spec("y", (1, "length")),)))


@pytest.mark.slow
def test_tracing_needs_no_weights() -> None:
    """The parameters of this encoder would take 22 GB."""
    networks = meta_networks(S2V_14B)
    graph = Tracer({"text_encoder": TextEncoder(networks)}).trace(contracts(S2V_14B)["text_encoder"])
    shapes = {name: tuple(value.shape or ()) for name, value in graph.weights}
    assert shapes["text.shared.weight"] == (256_384, 4096)
    assert len(shapes) == 242
