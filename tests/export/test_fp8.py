"""The FP8 recipe: which linears, which numbers, which nodes, and that the graphs compute what they say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from live_avatar.config import S2V_14B, Preset
from live_avatar.errors import ExportError
from live_avatar.exporter.build import export_artifacts
from live_avatar.exporter.quantization import (
    HEADROOM,
    INPUT_SCALE,
    PART,
    WEIGHT,
    WEIGHT_SCALE,
    Calibration,
    DynamicScaling,
    QuantizedWeights,
    Scaling,
    quantize_checkpoint,
    quantize_graph,
    quantize_weight,
    static_scale,
)
from live_avatar.exporter.tracing import TracedGraph, Tracer, random_inputs
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.graphs.components import build_components
from live_avatar.graphs.contract import DIT, TEXT, Extent, contracts
from live_avatar.model.dit import CausalDiT
from live_avatar.model.linears import is_fp8, is_fp8_in_release
from live_avatar.model.networks import meta_networks
from live_avatar.runtime.onnx_runtime import OnnxRuntime
from live_avatar.runtime.torch_runtime import TorchRuntime
from live_avatar.weights import fp8
from live_avatar.weights.checkpoint import open_checkpoint
from live_avatar.weights.tensors import Checkpoint
from tests.export.conftest import CALIBRATED_BLOCKS, LEAST, TWO_STEPS
from tests.support.tensorrt_operators import Graph, faults
from tests.tolerances import EXPORT

WIDE = replace(TWO_STEPS, dit=replace(TWO_STEPS.dit, dim=256, num_heads=2, ffn_dim=512))
"""Heads of the real width: narrower ones have no fused attention."""


def linears(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]


def traced(precision: str, scaling: Scaling, *components: str, preset: Preset = TWO_STEPS) -> dict[str, TracedGraph]:
    preset = preset.with_precision(precision)
    tracer, agreed = Tracer(build_components(preset, meta_networks(preset))), contracts(preset)
    return {name: quantize_graph(tracer.trace(agreed[name]), name, scaling) for name in components}


@pytest.fixture(scope="module")
def float32_graphs(calibration: Calibration) -> dict[str, TracedGraph]:
    return traced("float32", calibration, DIT)


@pytest.fixture(scope="module")
def bfloat16_graphs(calibration: Calibration) -> dict[str, TracedGraph]:
    return traced("bfloat16", calibration, DIT, TEXT)


def test_the_release_quantizes_the_same_linears_and_adaln() -> None:
    with torch.device("meta"):
        names = linears(CausalDiT(S2V_14B.dit))
    ours = {name for name in names if is_fp8(name)}
    assert len(ours) == 448
    left = {name for name in names if is_fp8_in_release(name)} - ours
    assert left == {f"audio_injector.injector_adain_layers.{i}.linear" for i in range(12)}
    assert not [name for name in ours if not is_fp8_in_release(name)]


def test_a_scale_is_the_released_one_rounded_up_to_bfloat16() -> None:
    amax = torch.logspace(-14, 6, 500)
    ours, released = static_scale(amax), 1 / fp8.quant_scale(amax)
    assert torch.equal(ours, ours.bfloat16().float())
    assert bool((ours >= released).all())
    assert bool((ours <= released * (1 + 2**-7)).all())
    assert bool((amax / ours <= fp8.MAX_E4M3).all())


def test_a_weight_comes_back_transposed_and_within_half_a_step() -> None:
    stored = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    numbers, counts = quantize_weight(stored)
    assert numbers.dtype == torch.float8_e4m3fn
    assert numbers.shape == (32, 24)
    error = (fp8.dequantize(numbers, counts).t() - stored).abs()
    assert bool((error <= torch.maximum(stored.abs() * 2**-4, counts * 2**-10)).all())


class Counted:
    """Weights that note what is read."""

    origin = "test"
    files = ()

    def __init__(self) -> None:
        self.was_read: list[str] = []

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {"blocks.0.ffn.0.weight": (3, 2), "blocks.0.ffn.0.bias": (3,), "blocks.0.self_attn.norm_q.weight": (2,)}

    def read(self, name: str) -> Tensor:
        self.was_read.append(name)
        return torch.full(self.shapes()[name], 7.0)


def test_weights_are_read_once_and_all_but_the_quantized_as_they_are() -> None:
    stored = Counted()
    weights = QuantizedWeights(stored)
    assert weights.shapes() == {
        "blocks.0.ffn.0.weight": (2, 3),
        "blocks.0.ffn.0.weight_scale": (),
        "blocks.0.ffn.0.bias": (3,),
        "blocks.0.self_attn.norm_q.weight": (2,),
    }
    read = {name: weights.read(name) for name in weights.shapes()}
    assert stored.was_read == list(stored.shapes())
    numbers, counts = read["blocks.0.ffn.0.weight"], read["blocks.0.ffn.0.weight_scale"]
    assert torch.equal(fp8.dequantize(numbers, counts), 448 * counts.expand(2, 3))
    assert torch.equal(read["blocks.0.ffn.0.bias"], torch.full((3,), 7.0))
    assert torch.equal(QuantizedWeights(Counted()).read("blocks.0.ffn.0.weight_scale"), counts)


def test_every_quantized_linear_is_a_product_of_dequantized_numbers(bfloat16_graphs: dict[str, TracedGraph]) -> None:
    graph = bfloat16_graphs[DIT]
    products = 0
    for name, value in graph.weights:
        linear = name.removesuffix(WEIGHT).removeprefix(PART)
        if not (name.startswith(PART) and name.endswith(WEIGHT) and is_fp8(linear)):
            assert value.dtype != ir.DataType.FLOAT8E4M3FN, name
            continue
        assert value.dtype == ir.DataType.FLOAT8E4M3FN, name
        (dequantized,) = [use.node for use in value.uses()]
        (product,) = [use.node for use in dequantized.outputs[0].uses()]
        source = product.inputs[0]
        assert source is not None
        assert (dequantized.op_type, product.op_type) == ("DequantizeLinear", "MatMul")
        numbers = source.producer()
        assert numbers is not None
        assert numbers.op_type == "DequantizeLinear"
        assert len(list(source.uses())) == 1, "every product has a DequantizeLinear of its own"
        for node, kind in ((dequantized, WEIGHT_SCALE), (numbers, INPUT_SCALE)):
            counts = node.inputs[1]
            assert counts is not None
            assert counts.name is not None
            assert counts.name.endswith(kind)
            assert counts.dtype == ir.DataType.BFLOAT16
            assert counts.shape == ()
        products += 1
    assert products == 8 + 4  # of the layer, without the text's keys and values, and of the audio injector


def test_linears_of_one_input_share_its_numbers(float32_graphs: dict[str, TracedGraph]) -> None:
    quantizers = [node for node in float32_graphs[DIT].model.graph if node.op_type == "QuantizeLinear"]
    assert sorted(len(list(node.outputs[0].uses())) for node in quantizers) == [1, 1, 1, 1, 1, 1, 1, 2, 3]


def test_an_inputs_scale_is_that_of_the_calibration(
    float32_graphs: dict[str, TracedGraph], calibration: Calibration
) -> None:
    scales = {name: value for name, value in float32_graphs[DIT].constants.items() if name.endswith(INPUT_SCALE)}
    assert len(scales) == 9
    for name, value in scales.items():
        amax = calibration.amax[DIT][name.removesuffix(INPUT_SCALE)]
        assert value == static_scale(torch.tensor(HEADROOM * amax))


def test_tensorrt_reads_every_operator(bfloat16_graphs: dict[str, TracedGraph]) -> None:
    for name, graph in bfloat16_graphs.items():
        for _, value in graph.weights:
            value.const_value = ir.ExternalTensor("absent", 0, 0, value.dtype, shape=value.shape, name=value.name)
        model = ir.to_proto(graph.model)
        assert list(faults(Graph.of(name, model))) == []
        assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in model.graph.node}


def test_a_computed_scale_is_divided_out_before_and_multiplied_after() -> None:
    """QuantizeLinear itself gets the scale 1, since TensorRT-RTX makes no FP8 product of another that is computed."""
    graph = traced("bfloat16", DynamicScaling(), DIT)[DIT].model.graph
    quantizers = [node for node in graph if node.op_type == "QuantizeLinear"]
    assert len(quantizers) == 9
    products = [use.node for node in quantizers for use in node.outputs[0].uses()]
    assert len(products) == 8 + 4
    for node in [*quantizers, *products]:
        unit = node.inputs[1]
        assert unit is not None
        assert unit.const_value is not None
        assert unit.const_value.numpy() == 1
    for node in products:
        (product,) = [use.node for use in node.outputs[0].uses()]
        (scaled,) = [use.node for use in product.outputs[0].uses()]
        assert (product.op_type, scaled.op_type) == ("MatMul", "Mul")
        divided = node.inputs[0].producer().inputs[0].producer()  # type: ignore[union-attr]
        assert divided is not None
        assert (divided.op_type, divided.inputs[1]) == ("Div", scaled.inputs[1])


@pytest.mark.slow
@pytest.mark.parametrize("scaling", ["static", "dynamic"])
def test_nvidias_compiler_makes_fp8_products(scaling: str, calibration: Calibration) -> None:
    """A product of 16 bits shows in the names of kernels: inputs are cast to FP8 and back and multiplied by their
    scale, and so are weights."""
    trt = pytest.importorskip("tensorrt_rtx")
    recipe = calibration if scaling == "static" else DynamicScaling()
    kernels = compiled_kernels(trt, ones(traced("bfloat16", recipe, DIT, preset=WIDE)[DIT]))
    assert len(kernels) > 10
    assert not [name for name in kernels if "CastCastMul" in name or "CastMulFc" in name]


def ones(graph: TracedGraph) -> bytes:
    """The model with ones for weights and scales; a scale of 0 is refused."""
    for _, value in graph.weights:
        if value.const_value is None:
            assert value.dtype is not None
            assert value.shape is not None
            value.const_value = ir.tensor(np.ones(value.shape.numpy(), value.dtype.numpy()), value.dtype)
    return ir.to_proto(graph.model).SerializeToString()


def compiled_kernels(trt: Any, model: bytes) -> set[str]:
    """Names of the kernels that the compiler generated for Ada; products are of a library and not among them."""
    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse(model), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    contract = contracts(WIDE)[DIT]
    for spec in contract.inputs:
        profile.set_shape(spec.name, *(contract.shape(spec, extent) for extent in (Extent.MIN, Extent.OPT, Extent.MAX)))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None
    return {name.decode() for name in re.findall(rb"__myl_([A-Z][A-Za-z]*)", bytes(plan))}


def test_a_linear_without_calibration_is_refused(calibration: Calibration) -> None:
    bare = replace(calibration, amax={TEXT: calibration.amax[TEXT]})
    with pytest.raises(ExportError, match=r"dit: the calibration has no input of dit\.blocks\.0\..*calibrate"):
        traced("float32", bare, DIT)


def test_a_calibration_of_another_preset_is_refused(calibration: Calibration) -> None:
    with pytest.raises(ExportError, match=r"the calibration is of preset tiny, expected least; calibrate that one"):
        quantize_checkpoint(open_checkpoint(LEAST), replace(calibration, preset="tiny"))


def test_a_linear_of_other_operators_is_refused(calibration: Calibration) -> None:
    x, w = (
        ir.Value(name=name, shape=ir.Shape((4, 4)), type=ir.TensorType(ir.DataType.FLOAT))
        for name in ("x", "dit.blocks.0.ffn.0.weight")
    )
    node = ir.node("Gemm", [x, w], {"transB": 1})
    model = ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 23}), ir_version=10)
    with pytest.raises(ExportError, match=r"dit\.blocks\.0\.ffn\.0 is made of Gemm, expected Transpose, MatMul; leave"):
        quantize_graph(TracedGraph(model, [("dit.blocks.0.ffn.0.weight", w)], {}), DIT, calibration)


def test_a_calibration_survives_its_file(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    calibration.write(path)
    assert Calibration.read(path) == calibration
    path.write_text('{"preset": "tiny", "blocks": 2, "amax": [1]}')
    with pytest.raises(ExportError, match=r"calibration\.json is not a calibration \(.*make one with"):
        Calibration.read(path)
    path.write_text('{"amax":' * 100_000)
    with pytest.raises(ExportError, match=r"calibration\.json is not a calibration \(it is nested too deeply\); make"):
        Calibration.read(path)
    for wrong in ("NaN", "Infinity", "-1"):
        path.write_text(f'{{"preset": "tiny", "blocks": 2, "amax": {{"dit": {{"dit.head": {wrong}}}}}}}')
        with pytest.raises(
            ExportError, match=r"calibration \(a largest input is .*, expected a number of at least 0\)"
        ):
            Calibration.read(path)
    with pytest.raises(ExportError, match=r"absent\.json is not a calibration \(.*No such file"):
        Calibration.read(tmp_path / "absent.json")


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(TWO_STEPS)


@pytest.fixture(scope="module")
def fp8_artifacts(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Checkpoint, calibration: Calibration
) -> Artifacts:
    return export_artifacts(checkpoint, tmp_path_factory.mktemp("fp8") / "fp8", lambda component: None, calibration)


@pytest.fixture(scope="module")
def dynamic_artifacts(tmp_path_factory: pytest.TempPathFactory, checkpoint: Checkpoint) -> Artifacts:
    return export_artifacts(
        checkpoint, tmp_path_factory.mktemp("fp8") / "fp8", lambda component: None, DynamicScaling()
    )


def emulated(checkpoint: Checkpoint, component: str, amax: Mapping[str, float] | None) -> TorchRuntime:
    """The recipe in torch, with the input scales of one component; None: each token has its own."""
    runtime = TorchRuntime(checkpoint)
    for name, module in runtime._components[component].named_modules():
        if isinstance(module, nn.Linear) and name.startswith(PART) and is_fp8(name.removeprefix(PART)):
            numbers, counts = quantize_weight(module.weight.data)
            module.weight.data = fp8.dequantize(numbers, counts).t().contiguous()
            module.register_forward_pre_hook(
                dynamic if amax is None else static(static_scale(torch.tensor(HEADROOM * amax.get(name, 1.0))))
            )
    return runtime


def static(counts: Tensor):
    return lambda _, args: (fp8.dequantize(fp8.saturate(args[0] / counts), counts),)


def dynamic(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
    counts = 1 / fp8.quant_scale(args[0].abs().amax(-1, keepdim=True))
    return (fp8.dequantize(fp8.saturate(args[0] / counts), counts),)


@pytest.mark.parametrize("scaling", ["static", "dynamic"])
@pytest.mark.parametrize("component", [DIT, TEXT])
def test_onnx_computes_what_the_recipe_says(
    request: pytest.FixtureRequest, checkpoint: Checkpoint, calibration: Calibration, component: str, scaling: str
) -> None:
    artifacts = request.getfixturevalue("fp8_artifacts" if scaling == "static" else "dynamic_artifacts")
    assert artifacts.manifest["fp8"] == (
        {"calibrated_on_blocks": CALIBRATED_BLOCKS} if scaling == "static" else {"scaling": "dynamic"}
    )
    inputs = random_inputs(contracts(TWO_STEPS)[component], seed=3)
    got = OnnxRuntime(artifacts).graph(component).run(inputs)
    amax = calibration.amax[component] if scaling == "static" else None
    expected = emulated(checkpoint, component, amax).graph(component).run(inputs)
    plain = TorchRuntime(checkpoint).graph(component).run(inputs)
    for name, value in expected.items():
        allowed = EXPORT * np.abs(value).max()
        assert np.abs(got[name] - value).max() <= allowed, name
        assert np.abs(plain[name] - value).max() > allowed, name


def test_the_weights_of_a_linear_stand_in_a_quarter_of_the_bytes(fp8_artifacts: Artifacts) -> None:
    model = onnx.load(fp8_artifacts.graph_path(DIT), load_external_data=False)
    (tensor,) = [t for t in model.graph.initializer if t.name == "dit.blocks.0.self_attn.k.weight"]
    assert tensor.data_type == onnx.TensorProto.FLOAT8E4M3FN
    place = {entry.key: entry.value for entry in tensor.external_data}
    assert int(place["length"]) == TWO_STEPS.dit.dim**2
