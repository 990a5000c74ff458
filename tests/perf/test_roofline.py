"""Operations and bytes, on graphs small enough to count by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper

from live_avatar.errors import InputError
from live_avatar.graphs.artifacts import Artifacts
from perf.preset_cost import artifacts_costs, preset_costs
from perf.roofline import Ceilings, Cost, Tensor, count, load_graph

FLOAT, HALF = TensorProto.FLOAT, TensorProto.BFLOAT16


def graph(
    nodes: Sequence[NodeProto], inputs: Sequence[str], outputs: Sequence[str], **weights: Sequence[int]
) -> ModelProto:
    """Float32 inputs and outputs without shapes; weights of zeros."""
    return helper.make_model(
        helper.make_graph(
            list(nodes),
            "test",
            [helper.make_tensor_value_info(name, FLOAT, None) for name in inputs],
            [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs],
            [helper.make_tensor(name, FLOAT, dims, bytes(4 * _size(dims)), raw=True) for name, dims in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 23)],
    )


def _size(dims: Sequence[int]) -> int:
    size = 1
    for dim in dims:
        size *= dim
    return size


def test_matmul_and_what_moves() -> None:
    """[2, 3, 5] times a weight [5, 7], and a sum: 2 x 3 x 7 results of 5 products each."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Add", ["y", "y"], ["z"])]
    cost = count(graph(nodes, ["x"], ["z"], w=(5, 7)), {"x": (2, 3, 5)})
    assert cost.flops_by_operator == {"MatMul": 2 * 5 * 42}
    assert (cost.weight_bytes, cost.input_bytes, cost.output_bytes) == (4 * 35, 4 * 30, 4 * 42)
    assert cost.least_bytes == 4 * (35 + 30 + 42)
    assert cost.unfused_bytes == 4 * (30 + 35 + 42) + 4 * (42 + 42 + 42)
    assert cost.intensity == pytest.approx(420 / 428)


@pytest.mark.parametrize(("transposed", "shape"), [(0, (4, 6)), (1, (6, 4))])
def test_gemm_takes_its_inner_size_from_the_transposition(transposed: int, shape: tuple[int, int]) -> None:
    node = helper.make_node("Gemm", ["x", "w"], ["y"], transA=transposed)
    assert count(graph([node], ["x"], ["y"], w=(6, 3)), {"x": shape}).flops == 2 * 4 * 3 * 6


def test_grouped_convolution() -> None:
    """8 channels in 2 groups to 4, 3x3, no padding: 4 x 6 x 6 results of 4 x 9 products."""
    node = helper.make_node("Conv", ["x", "w"], ["y"], group=2)
    assert count(graph([node], ["x"], ["y"], w=(4, 4, 3, 3)), {"x": (1, 8, 8, 8)}).flops == 2 * (4 * 36) * 36


def test_attention_is_two_products() -> None:
    """10 queries, 30 keys, 2 heads of 8; values 16 wide."""
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"])
    shapes = {"q": (1, 2, 10, 8), "k": (1, 2, 30, 8), "v": (1, 2, 30, 16)}
    assert count(graph([node], ["q", "k", "v"], ["y"]), shapes).flops == 2 * 2 * 10 * 30 * (8 + 16)


def test_shapes_that_the_graph_computes() -> None:
    """The reshape's target comes from the input's own shape."""
    nodes = [
        helper.make_node("Shape", ["x"], ["dims"], start=0, end=1),
        helper.make_node("Concat", ["dims", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["y"]),
    ]
    model = graph(nodes, ["x"], ["y"], w=(6, 2))
    model.graph.initializer.append(helper.make_tensor("rest", TensorProto.INT64, [1], [-1]))
    assert count(model, {"x": (5, 2, 3)}).flops == 2 * 6 * 10


def test_an_unknown_shape_is_an_error_and_not_a_zero() -> None:
    nodes = [helper.make_node("Reshape", ["x", "target"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["y"])]
    model = graph(nodes, ["x", "target"], ["y"], w=(6, 2))
    model.graph.input[1].type.tensor_type.elem_type = TensorProto.INT64
    with pytest.raises(InputError, match=r"the shape of 'flat' at MatMul '' does not follow from the inputs'"):
        count(model, {"x": (5, 6), "target": (2,)})
    with pytest.raises(InputError, match=r"input 'target' has no shape here; give one of each"):
        count(model, {"x": (5, 6)})


def test_sizes_of_narrow_types() -> None:
    assert Tensor.of((3, 5), HALF).bytes == 30
    assert Tensor.of((3, 5), TensorProto.FLOAT8E4M3FN).bytes == 15
    assert Tensor.of((3, 5), TensorProto.INT4).bytes == 8


def test_the_bound_is_the_longer_of_the_two() -> None:
    machine = Ceilings("test", flops_per_s=100.0, bytes_per_s=10.0, source="given")
    much_work, much_data = Cost({"MatMul": 400}, weight_bytes=10), Cost({"MatMul": 100}, weight_bytes=30)
    assert (machine.bound_s(much_work), machine.limited_by(much_work)) == (4.0, "operations")
    assert (machine.bound_s(much_data), machine.limited_by(much_data)) == (3.0, "bytes")
    faster = Ceilings("test", 100.0, 10.0, "given", operators={"MatMul": 400.0})
    assert faster.compute_s(Cost({"MatMul": 400, "Conv": 100})) == pytest.approx(2.0)
    assert faster.limited_by(Cost({"MatMul": 400}, weight_bytes=11)) == "bytes"
    both = Cost.combined((1, much_work), (1, much_data))
    assert (both.flops, both.least_bytes) == (500, 40)


def test_every_graph_of_the_artifacts_can_be_counted(artifacts: Artifacts) -> None:
    costs = artifacts_costs(artifacts)
    assert all(cost.flops > 0 for cost in costs.values())
    # All steps have the same shapes.
    assert costs["dit_step_1"] == costs["dit_step_4"]


def test_a_step_of_the_artifacts_counted_from_its_sizes(artifacts: Artifacts) -> None:
    """The products of self-attention, over history, sink and the block itself, and those of cross-attention."""
    preset, agreed = artifacts.preset, artifacts.contracts["dit_step_1"]
    stream, dit = preset.stream, preset.dit
    shapes = {s.name: agreed.shape(s, 2) for s in agreed.inputs}
    cost = count(load_graph(str(artifacts.graph_path("dit_step_1"))), shapes)
    seen = stream.window_blocks * stream.block_tokens + stream.sink_tokens
    own = dit.num_layers * 4 * stream.block_tokens * seen * dit.dim
    text = dit.num_layers * 4 * stream.block_tokens * dit.text_len * dit.dim
    audio = 4 * dit.dim * stream.block_tokens * (dit.num_audio_token + 1) * len(dit.audio_inject_layers)
    assert cost.flops_by_operator["Attention"] == own + text + audio


@pytest.mark.slow
def test_layers_counted_from_two_are_those_of_the_whole(artifacts: Artifacts) -> None:
    """Operations, inputs and outputs are the same; constants of the graph differ by a little."""
    exported, traced = artifacts_costs(artifacts), preset_costs(artifacts.preset)
    for name, cost in traced.items():
        whole = exported[name]
        assert cost.flops_by_operator == whole.flops_by_operator, name
        assert (cost.input_bytes, cost.output_bytes) == (whole.input_bytes, whole.output_bytes), name
        assert cost.weight_bytes == pytest.approx(whole.weight_bytes, rel=0.01), name
