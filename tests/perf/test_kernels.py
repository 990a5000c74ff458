"""Ways of running the networks in torch: each gives eager torch's result, or says why it was not run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from live_avatar.config import TINY
from live_avatar.graphs.components import build_components
from live_avatar.graphs.contract import DIT, Extent, contracts
from live_avatar.model.attention import Linear
from live_avatar.weights.fp8 import fake_quantize
from perf.kernels import (
    FP8Linear,
    attention,
    ceilings,
    channels_last,
    cuda_graph,
    difference,
    eager,
    random_networks,
    random_tensors,
    timed,
    to_fp8,
)
from perf.preset_cost import CONDITIONING, DECODER, PREFILL, STEP
from perf.roofline import Ceilings, Cost
from perf.scenario import Figures, broken
from perf.scenarios.kernels import (
    BLOCK_USE,
    FURTHER,
    PLAIN,
    Bench,
    _attention,
    _checks,
    _components,
    _half,
    fastest,
)

CPU = torch.device("cpu")
SMALL = TINY.with_stream(height=64, width=64)
ONE_LAYER = replace(SMALL, dit=replace(TINY.dit, num_layers=1, audio_inject_layers=(0,)))


@pytest.fixture(scope="module")
def bench() -> Bench:
    """One layer at 64x64, in every way but the compiler's, which takes a minute."""
    ways = {name: way for name, way in {**PLAIN, **FURTHER}.items() if "compiled" not in name}
    costs = {name: Cost({"MatMul": 10**6}) for name in (*CONDITIONING, *STEP, *PREFILL, DECODER)}
    roof = Ceilings("a desk", 1e9, 1e9, "given", {"MatMul": 2e9})
    return Bench(ONE_LAYER, CPU, ways, 1, random_networks(ONE_LAYER, CPU), roof, costs)


@pytest.fixture(scope="module")
def components(bench: Bench) -> dict[str, Figures]:
    return _components(bench)


@pytest.mark.slow
def test_every_way_gives_eager_torchs_result_or_says_why_not(
    components: dict[str, Figures],
) -> None:
    assert set(components) == {*CONDITIONING, *STEP, *PREFILL, DECODER}
    assert set(components[BLOCK_USE]) == {"eager", "CUDA graph", "FP8, eager", "FP8, CUDA graph"}
    assert set(components[DECODER]) == {"eager", "CUDA graph", "channels last"}
    checks = _checks(components)
    assert [one["what"] for one in checks] == [
        "difference of dit, FP8, eager",
        "difference of dit, sink, FP8, eager",
        "difference of vae_decoder, channels last",
    ]
    assert broken({"checks": checks}) == []
    assert all(one["value"] > 0 for one in checks[:2]), "FP8 rounds"
    for ways in components.values():
        assert ways["CUDA graph"] == {"not_run": "NotImplementedError: a CUDA graph needs a GPU"}
        assert fastest(ways) <= ways["eager"]["seconds"]


@pytest.mark.slow
def test_a_share_is_of_the_roof_for_its_numbers(components: dict[str, Figures]) -> None:
    """10^6 operations at 10^9 a second, or at twice that for FP8 products."""
    for way, bound_s in (("eager", 1e-3), ("FP8, eager", 0.5e-3)):
        found = components[BLOCK_USE][way]
        assert found["share_of_bound"] == pytest.approx(bound_s / found["seconds"])


def test_attention_is_over_history_block_and_sink(bench: Bench) -> None:
    found = _attention(bench)
    shapes = {spec.name: spec for spec in contracts(ONE_LAYER)[DIT].inputs}
    agreed = contracts(ONE_LAYER)[DIT]
    past = sum(agreed.shape(shapes[name], Extent.MAX)[2] for name in ("sink_k.0", "history_k.0"))
    assert found["keys"] == found["queries"] + past
    assert found["kernels"]["math"]["seconds"] > 0
    assert "No viable backend" in found["kernels"]["cudnn_attention"]["not_run"]


def test_half_a_picture_has_a_margin(bench: Bench) -> None:
    found = _half(bench)
    assert (found["latents_wide"], found["of"]) == (8, 8), "half of eight and a margin of four"
    assert found["seconds"] > 0


def test_an_fp8_linear_is_the_product_of_rounded_operands() -> None:
    generator = torch.Generator().manual_seed(1)
    linear = Linear(64, 32)
    x = torch.randn(2, 5, 64, generator=generator)
    with torch.inference_mode():
        expected = nn.functional.linear(fake_quantize(x), fake_quantize(linear.weight), linear.bias)
        assert FP8Linear(linear)(x) == pytest.approx(expected, abs=1e-5)


def test_fp8_replaces_what_the_export_quantizes() -> None:
    dit = random_networks(ONE_LAYER, CPU).dit
    replaced = to_fp8(dit)
    named = {name: module for name, module in dit.named_modules() if isinstance(module, FP8Linear)}
    assert len(named) == replaced > 0
    assert "blocks.0.self_attn.q" in named
    assert "blocks.0.ffn.2" in named
    assert isinstance(dit.head.head, nn.Linear)


def test_networks_of_no_file_have_finite_results() -> None:
    networks = random_networks(ONE_LAYER, CPU)
    module = build_components(ONE_LAYER, networks)[DIT]
    with torch.inference_mode():
        velocity, *_ = module(*random_tensors(contracts(ONE_LAYER)[DIT], CPU, Extent.MAX))
    assert bool(velocity.isfinite().all())
    assert float(velocity.std()) > 0


def test_what_cannot_be_run_says_why() -> None:
    def refuse() -> object:
        raise RuntimeError("no such kernel\nand many lines more")

    found = timed(lambda: refuse, CPU, 1)
    assert (found.seconds, found.not_run) == (None, "RuntimeError: no such kernel")
    module = nn.Linear(4, 4)
    assert timed(lambda: cuda_graph(module, [torch.ones(1, 4)]), CPU, 1).seconds is None
    assert timed(lambda: eager(module, [torch.ones(1, 4)]), CPU, 1).seconds is not None


def test_channels_last_moves_the_weights_and_not_the_result() -> None:
    module, x = nn.Conv3d(2, 3, 2), torch.randn(1, 2, 3, 8, 8)
    with torch.inference_mode():
        expected = module(x)
        found = channels_last(module, [x])()
    assert module.weight.stride(1) == 1
    assert difference((found,), (expected,)) < 1e-5


def test_ceilings_are_of_this_device() -> None:
    found = ceilings(ONE_LAYER, CPU, runs=1, size=64, copied_bytes=2**20)
    assert found.flops_per_s > 0
    assert found.bytes_per_s > 0
    assert found.operators["MatMul"] > 0
    assert attention(1, 4, 8, 16, torch.float32, CPU, 1)["math"].outputs[0].shape == (1, 1, 4, 16)
