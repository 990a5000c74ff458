"""NVIDIA's compiler on the true widths: two layers of the 14B model at 704x384, with an adapter, also in FP8.

Minutes and 8 GB of disk; `make test-slow`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from export.synthetic import made_up_calibration, official_preset, write_checkpoint, write_lora
from live_avatar.config import S2V_14B, TINY
from live_avatar.exporter.build import export_artifacts
from live_avatar.exporter.engines import EngineOptions, build_engines
from live_avatar.exporter.quantization import QUANTIZED
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.graphs.contract import contracts
from live_avatar.graphs.engines import read_engines
from live_avatar.graphs.flavours import TENSORRT_RTX
from live_avatar.weights.checkpoint import open_checkpoint
from live_avatar.weights.lora import LoRA
from live_avatar.weights.tensors import Checkpoint

CUT = {"layers": 2, "text-layers": 1, "text-vocab": 1024, "speech-layers": 2}
RANK = 128
COMPONENTS = tuple(contracts(TINY))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("full-width")


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    preset = official_preset(S2V_14B, CUT)
    write_checkpoint(preset, folder / "weights", seed=0)
    write_lora(preset, folder / "adapter.safetensors", seed=1, rank=RANK)
    found = open_checkpoint(None, folder / "weights", LoRA(folder / "adapter.safetensors", alpha=None))
    return dataclasses.replace(found, preset=found.preset.with_precision("bfloat16"))


@pytest.fixture(scope="module")
def exported(folder: Path, checkpoint: Checkpoint) -> Artifacts:
    return export_artifacts(checkpoint, folder / "bfloat16", lambda name: None)


@pytest.fixture(scope="module")
def exported_fp8(folder: Path, checkpoint: Checkpoint) -> Artifacts:
    calibration = made_up_calibration(checkpoint.preset)
    return export_artifacts(checkpoint, folder / "fp8", lambda name: None, calibration)


def compile_for(artifacts: Artifacts, component: str, capability: str) -> None:
    options = EngineOptions(TENSORRT_RTX, (capability,), (component,))
    build_engines(artifacts.folder, options, lambda line: None)
    assert read_engines(artifacts)[component].target.compute_capabilities == (capability,)


@pytest.mark.parametrize("capability", ["8.0", "8.9", "12.0"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_every_graph_of_the_released_widths_compiles(exported: Artifacts, component: str, capability: str) -> None:
    compile_for(exported, component, capability)


@pytest.mark.parametrize("capability", ["8.9", "12.0"])
@pytest.mark.parametrize("component", QUANTIZED)
def test_the_transformer_in_fp8_compiles(exported_fp8: Artifacts, component: str, capability: str) -> None:
    compile_for(exported_fp8, component, capability)


def test_only_the_vae_may_decompose_an_attention(exported: Artifacts) -> None:
    reasons = {name: contract.decomposable for name, contract in exported.contracts.items() if contract.decomposable}
    assert set(reasons) == {"vae_encoder", "vae_decoder_warm_up", "vae_decoder"}
    assert reasons["vae_decoder"].startswith("one head of 384 channels over one frame: fused kernels take heads of 12")
