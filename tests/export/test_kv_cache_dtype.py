"""An FP8 KV cache: the graph dequantizes past keys and values, and streams on ONNX Runtime and torch agree."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from export.synthetic import made_up_calibration
from live_avatar.arrays import Array
from live_avatar.config import Preset
from live_avatar.exporter.quantization import quantize_graph
from live_avatar.exporter.tracing import TracedGraph, Tracer
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.graphs.components import build_components
from live_avatar.graphs.contract import DIT, contracts, kv_names
from live_avatar.model.networks import meta_networks
from live_avatar.runtime.onnx_runtime import OnnxRuntime
from live_avatar.runtime.torch_runtime import TorchRuntime
from live_avatar.weights.checkpoint import open_checkpoint
from perf.fp8_error import ReleasedFP8
from tests.export.conftest import FP8_CACHE, LEAST
from tests.support.artifacts import exported_once
from tests.support.networks import first_step
from tests.support.tensorrt_operators import Graph, faults
from tests.tolerances import EXPORTED_STREAM

BLOCKS = 6
"""The ring is full from the fourth on, and wraps."""
PLAIN = FP8_CACHE.with_kv_cache_dtype(None)
HISTORY = kv_names("history", LEAST.dit.num_layers)


def traced(preset: Preset) -> TracedGraph:
    return Tracer(build_components(preset, meta_networks(preset))).trace(contracts(preset)[DIT])


@pytest.mark.parametrize("with_fp8_weights", [False, True])
def test_past_keys_and_values_are_dequantized_with_scale_1_before_they_are_joined(with_fp8_weights: bool) -> None:
    """TensorRT refuses a Cast from FP8; it makes one kernel of DequantizeLinear and Concat."""
    graph = traced(LEAST.with_precision("bfloat16").with_kv_cache_dtype("fp8"))
    if with_fp8_weights:
        graph = quantize_graph(graph, DIT, made_up_calibration(LEAST))
    inputs = {str(value.name): value for value in graph.model.graph.inputs}
    assert {name for name, value in inputs.items() if value.dtype == ir.DataType.FLOAT8E4M3FN} == set(HISTORY)
    for name in HISTORY:
        (dequantized,) = (use.node for use in inputs[name].uses())
        (joined,) = (use.node for use in dequantized.outputs[0].uses())
        assert (dequantized.op_type, joined.op_type) == ("DequantizeLinear", "Concat")
        scale = dequantized.inputs[1]
        assert scale is not None
        assert scale.const_value is not None
        assert (scale.dtype, scale.shape, scale.const_value.numpy()) == (ir.DataType.BFLOAT16, (), 1)
    for _, value in graph.weights:
        value.const_value = ir.ExternalTensor("absent", 0, 0, value.dtype, shape=value.shape, name=value.name)
    assert list(faults(Graph.of(DIT, ir.to_proto(graph.model)))) == []


@pytest.fixture(scope="module")
def fp8_cache(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return exported_once(tmp_path_factory, FP8_CACHE)


def test_the_manifest_says_which_type(fp8_cache: Artifacts) -> None:
    assert fp8_cache.manifest["preset"]["kv_cache_dtype"] == "fp8"
    assert fp8_cache.manifest["fp8"] is None
    assert fp8_cache.contracts == contracts(FP8_CACHE)
    given = onnx.load(fp8_cache.graph_path(DIT), load_external_data=False).graph.input
    types = {value.name: value.type.tensor_type.elem_type for value in given}
    assert {name for name, kind in types.items() if kind == onnx.TensorProto.FLOAT8E4M3FN} == set(HISTORY)


def error(ours: list[Array], theirs: list[Array]) -> list[float]:
    """Largest difference of each block, relative to its largest value."""
    return [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ours, theirs, strict=True)]


def test_a_stream_on_onnx_runtime_is_that_of_torch(fp8_cache: Artifacts) -> None:
    ours, theirs = OnnxRuntime(fp8_cache), TorchRuntime(open_checkpoint(FP8_CACHE))
    assert max(error(first_step(ours, BLOCKS), first_step(theirs, BLOCKS))) <= EXPORTED_STREAM


def test_past_keys_and_values_in_fp8_cost_less_than_weights_in_fp8(fp8_cache: Artifacts) -> None:
    """The first block has no past, and its numbers are those without the option."""
    exact = first_step(TorchRuntime(open_checkpoint(PLAIN)), BLOCKS)
    first, *later = error(first_step(OnnxRuntime(fp8_cache), BLOCKS), exact)
    weights = error(first_step(ReleasedFP8(open_checkpoint(PLAIN)), BLOCKS), exact)
    assert first <= EXPORTED_STREAM
    assert min(later) > EXPORTED_STREAM
    assert all(cache < linears / 10 for cache, linears in zip(later, weights[1:], strict=True))
