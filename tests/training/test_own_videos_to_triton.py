"""From a folder of videos to an avatar that speaks through Triton, by the commands that the documents show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from export.synthetic import official_preset, write_checkpoint
from live_avatar.cli.main import main as cli
from live_avatar.config import VAEConfig
from live_avatar.graphs.artifacts import load_artifacts
from live_avatar.pipeline.generator import Generator
from live_avatar.runtime.onnx_runtime import OnnxRuntime
from live_avatar.runtime.torch_runtime import TorchRuntime
from live_avatar.serving.server import serving
from live_avatar.serving.server_options import ServerOptions
from live_avatar.weights.checkpoint import open_checkpoint
from tests.export.conftest import LEAST
from tests.serving.conftest import generated
from tests.serving.support import frames_of, received
from tests.support.training import toml
from training import films, prepare, run
from training.config import AdapterConfig, DataConfig, DistillationStage, DiTStage, LoRAConfig
from training.data.clips import Split, make_clip

pytestmark = pytest.mark.slow

SIDE, BLOCKS = 64, 2
FEW: dict[str, Any] = {"steps": 2, "batch": 1, "learning_rate": 0.1, "warmup_steps": 0, "blocks": BLOCKS}


def done(command: Any, *words: object) -> None:
    result = CliRunner().invoke(command, [str(word) for word in words])
    assert result.exit_code == 0, result.output


def test_videos_become_an_adapter_whose_frames_triton_serves(tmp_path: Path) -> None:
    videos, shards, out, artifacts = (tmp_path / name for name in ("videos", "shards", "run", "artifacts"))
    weights, config = tmp_path / "weights", tmp_path / "run.toml"
    write_checkpoint(official_preset(replace(LEAST, vae=VAEConfig(dim=4)), {}), weights, seed=3)
    settings = AdapterConfig(
        checkpoint=str(weights),
        lora=LoRAConfig(2, 4.0),
        height=SIDE,
        width=SIDE,
        precision="float32",
        data=DataConfig(blocks=BLOCKS, validation_clips=1, shards=str(shards)),
        stage1=DiTStage(**FEW),
        stage2=DistillationStage(**FEW, fake_learning_rate=1e-2, fake_steps=1),
    )
    config.write_text(toml(settings))

    done(films.main, "--output", videos, "--clips", 3, "--blocks", 3, "--size", SIDE)
    done(prepare.main, "--videos", videos, "--checkpoint", weights, "--config", config, "--output", shards,
         "--captions", videos / "captions.json", "--min-seconds", 0, "--validation-share", 0.3)  # fmt: skip
    done(run.main, "--config", config, "--stage", "all", "--out", out, "--threads", 1)
    adapter = out / "stage2" / "lora.safetensors"
    done(cli, "export", "--checkpoint", weights, "--lora", adapter, "--height", SIDE, "--width", SIDE,
         "--precision", "float32", "--output", artifacts)  # fmt: skip

    picture, speech = (videos / "train-0000.png").read_bytes(), make_clip(Split.TEST, 0, BLOCKS, SIDE).speech
    exported = load_artifacts(artifacts)
    assert exported.manifest["weights"]["dit"]["lora_scale"] == 2.0
    expected = generated(Generator(OnnxRuntime(exported)), picture, "hello", 3, speech)
    options = ServerOptions(artifacts).on_free_ports()
    with serving(options):
        assert np.array_equal(frames_of(received(options.url, picture, speech)), expected)
    base = TorchRuntime(open_checkpoint(settings.system, weights))
    untrained = generated(Generator(base), picture, "hello", 3, speech)
    assert np.abs(untrained.astype(int) - expected).mean() > 1, "the adapter is in the frames"
