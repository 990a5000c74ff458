"""The report of the compiler's kernels: what is read from its log, and one real build in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from live_avatar.graphs.artifacts import Artifacts
from perf.compiled import Kernel, kernels, summary
from perf.scenario import Context, broken
from perf.scenarios import engines
from perf.scenarios.engines import Model

LOG = """Something else
Layers:
Name: __myl_AddCast_myl0_0, LayerType: kgen, Inputs: [ { Name: x, Dimensions: [2,3], Strides: [3,1], Datatype: Float, \
Format: (Linear) Row major linear format }], Constants: [ { Name: c, Dimensions: [100], Datatype: Float }], Outputs: [ \
{ Name: y, Dimensions: [2,3], Strides: [3,1], Datatype: BFloat16, Format: f }, { Name: s, Dimensions: [], Datatype: \
Int64 }], TacticName: __myl_AddCast, StreamId: 0, Metadata: [ONNX Layer: node_add]
Name: node_MatMul_1+node_MatMul_2_myl0_1, LayerType: gemm, Inputs: [ { Name: y, Dimensions: [2,3], Datatype: BFloat16 \
}], Constants: [], Outputs: [ { Name: z, Dimensions: [2,4], Datatype: BFloat16 }], TacticName: t, StreamId: 0, Metadata:
Name: _gemm_mha_v2_myl0_2, LayerType: kgen, Inputs: [ { Name: z, Dimensions: [2,4], Datatype: BFloat16 }], Constants: \
[], Outputs: [ { Name: w, Dimensions: [2,4], Datatype: BFloat16 }], TacticName: t, StreamId: 0, Metadata:
Name: __myl_Add_myl1_0, LayerType: kgen, Inputs: [], Constants: [], Outputs: [], TacticName: t, StreamId: 0, Metadata:
"""


def test_a_kernel_has_its_type_its_profile_and_the_bytes_of_its_tensors() -> None:
    first, product, attention, other = kernels(LOG)
    assert first == Kernel("__myl_AddCast_myl0_0", "kgen", 0, 2 * 3 * 4 + 2 * 3 * 2 + 8)
    assert product.is_product
    assert not product.is_attention
    assert attention.is_attention
    assert other.profile == 1


def test_the_summary_is_of_the_first_profile() -> None:
    figures = summary(kernels(LOG), layers=2)
    assert (figures["kernels"], figures["kernels_per_layer"], figures["fused_attentions"]) == (3, 1.5, 1)
    assert figures["by_kind"] == {"kgen": 2, "gemm": 1}
    assert figures["moved_by_other_kernels_mib"] * 2**20 == 2 * 3 * 4 + 2 * 3 * 2 + 8
    assert "kernels_per_layer" not in summary(kernels(LOG), layers=0)


def test_a_component_is_built_in_a_process_of_its_own(artifacts: Artifacts, tmp_path: Path) -> None:
    said: list[str] = []
    model = Model("tiny, float32", artifacts.folder, ("8.9",), ("audio_tokens",))
    figures = engines._compiled(Context(artifacts.folder, tmp_path, log=said.append), model)
    assert said == ["tiny, float32: audio_tokens for 8.9"]
    made = figures["8.9"]["audio_tokens"]
    assert made["attentions"] == made["fused_attentions"] == 0
    assert made["kernels"] > 0
    assert made["plan_bytes"] > 0
    assert made["peak_own_bytes"] > made["plan_bytes"]
    assert broken({"checks": list(engines._checks({"tiny": figures}))}) == []


@pytest.mark.parametrize(("fused", "reason", "holds"), [(2, "", True), (1, "", False), (1, "too wide", True)])
def test_an_attention_without_a_reason_must_be_fused(fused: int, reason: str, holds: bool) -> None:
    one = {"attentions": 2, "fused_attentions": fused, "may_be_decomposed": reason}
    checks = list(engines._checks({"tiny": {"8.9": {"dit": one}}}))
    assert (broken({"checks": checks}) == []) is holds
