"""From official files and an adapter to artifacts that run: the way of the released model, in small."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from export import compare
from export.synthetic import official_preset, write_checkpoint, write_lora
from live_avatar.config import VAEConfig
from live_avatar.exporter.build import export_artifacts
from live_avatar.graphs.artifacts import TOKENIZER, Artifacts
from live_avatar.pipeline.generator import Generator
from live_avatar.runtime.onnx_runtime import OnnxRuntime
from live_avatar.runtime.torch_runtime import TorchRuntime
from live_avatar.weights.checkpoint import open_checkpoint
from live_avatar.weights.lora import LoRA
from live_avatar.weights.tensors import Checkpoint
from tests.conftest import SEED, noise_speech
from tests.export.conftest import LEAST
from tests.tolerances import EXPORTED_STREAM

pytestmark = pytest.mark.slow  # an export of its own


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `weights` and an adapter beside it."""
    folder = tmp_path_factory.mktemp("official")
    preset = official_preset(replace(LEAST, vae=VAEConfig(dim=4)), {})
    write_checkpoint(preset, folder / "weights", seed=3)
    write_lora(preset, folder / "lora.safetensors", seed=4, rank=2)
    return folder


def opened(files: Path, adapted: bool = True) -> Checkpoint:
    """The folder with a small picture and one step, as options of the command would make it."""
    lora = LoRA(files / "lora.safetensors") if adapted else None
    found = open_checkpoint(None, files / "weights", lora)
    return Checkpoint(found.preset.with_stream(height=64, width=64, steps=1), found.parts, found.tokenizer)


@pytest.fixture(scope="module")
def exported(files: Path) -> Artifacts:
    return export_artifacts(opened(files), files / "artifacts", lambda component: None)


def test_the_artifacts_carry_tokenizer_sizes_and_provenance(files: Path, exported: Artifacts) -> None:
    assert (exported.folder / TOKENIZER).read_bytes() == (
        files / "weights" / "google" / "umt5-xxl" / TOKENIZER
    ).read_bytes()
    assert (exported.preset.name, exported.preset.dit) == ("custom", LEAST.dit)
    weights = exported.manifest["weights"]
    assert list(weights["vae"]["files"]) == ["Wan2.1_VAE.pth"]
    assert "lora.safetensors" in weights["dit"]["files"]
    assert weights["dit"]["lora_scale"] == 0.5
    exported.verify()


def test_a_stream_on_onnx_runtime_equals_torch(files: Path, exported: Artifacts, picture: bytes) -> None:
    runtimes = (OnnxRuntime(exported), TorchRuntime(opened(files)), TorchRuntime(opened(files, adapted=False)))
    ours, theirs, plain = (
        np.concatenate([b.latents for b in Generator(r).generate(picture, "A person.", SEED, noise_speech(0.96))])
        for r in runtimes
    )
    size = np.abs(theirs).max()
    assert np.abs(ours - theirs).max() / size <= EXPORTED_STREAM
    assert np.abs(plain - theirs).max() / size > 100 * EXPORTED_STREAM  # the adapter counts


def test_the_comparison_takes_folder_and_adapter(files: Path, exported: Artifacts) -> None:
    words = ["--artifacts", str(exported.folder), "--checkpoint", str(files / "weights"), "--component", "dit"]
    good = CliRunner().invoke(compare.main, [*words, "--lora", str(files / "lora.safetensors")])
    assert good.exit_code == 0, good.output
    assert [row.split()[0] for row in good.output.splitlines()] == ["component", "dit"]
    assert "TOO LARGE" in CliRunner().invoke(compare.main, words).output
    unknown = CliRunner().invoke(compare.main, [*words, "--component", "nose"])
    assert "has no component 'nose'; it has" in unknown.output
