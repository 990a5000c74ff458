"""The command on a checkpoint and shards: adapters of both stages, which the export takes, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from export.synthetic import official_preset, write_checkpoint
from live_avatar.config import Preset, VAEConfig
from live_avatar.model.networks import meta_dit
from live_avatar.weights.checkpoint import open_checkpoint
from live_avatar.weights.lora import LoRA
from tests.export.conftest import LEAST
from tests.support.training import toml, write_shards
from tests.training.conftest import drawn_clip, relative_error
from training import run
from training.config import AdapterConfig, DataConfig, DistillationStage, DiTStage, LoRAConfig, load
from training.lora import GENERATOR, Adapter, load_adapter
from training.roles import SharedBase, open_base
from training.window import Place, Window

BLOCKS = 2
FEW: dict[str, Any] = {
    "steps": 2, "batch": 1, "learning_rate": 0.1, "warmup_steps": 0, "checkpoint_every": 1, "blocks": BLOCKS,
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with the layout of the official download."""
    folder = tmp_path_factory.mktemp("official") / "weights"
    write_checkpoint(official_preset(dataclasses.replace(LEAST, vae=VAEConfig(dim=4)), {}), folder, seed=3)
    return folder


class AdapterRun:
    """A run in a folder with shards of noise."""

    def __init__(self, folder: Path, checkpoint: Path, **changes: Any) -> None:
        self.out, self.path, shards = folder / "run", folder / "run.toml", folder / "shards"
        given: dict[str, Any] = {
            "checkpoint": str(checkpoint),
            "lora": LoRAConfig(2, 4.0),
            "height": 64,
            "width": 64,
            "precision": "float32",
            "data": DataConfig(blocks=BLOCKS, validation_clips=1, shards=str(shards)),
            "stage1": DiTStage(**FEW),
            "stage2": DistillationStage(**FEW, fake_learning_rate=1e-2, fake_steps=1),
        }
        self.config = AdapterConfig(**{**given, **changes})
        self.path.write_text(toml(self.config))
        clips = [drawn_clip(BLOCKS, seed, self.config.system) for seed in range(3)]
        write_shards(shards, self.config.system, {"train": clips[:2], "validation": clips[2:]}, BLOCKS)

    def __call__(self, stage: str) -> Result:
        words = ["--config", str(self.path), "--stage", stage, "--out", str(self.out), "--threads", "1"]
        return CliRunner().invoke(run.main, words)


@pytest.fixture
def toy(tmp_path: Path, checkpoint: Path) -> AdapterRun:
    return AdapterRun(tmp_path, checkpoint)


def velocity(preset: Preset, network: Any) -> torch.Tensor:
    window, clip = Window(preset, BLOCKS), drawn_clip(BLOCKS, 9, preset)
    made: torch.Tensor = network(lambda dit: window.whole(dit, window.open(dit, clip), Place(0, 30), clip.latents, 0.5))
    return made.detach()


def test_both_stages_make_an_adapter_that_the_core_merges(toy: AdapterRun, checkpoint: Path) -> None:
    done = toy("all")
    assert done.exit_code == 0, done.output
    adapter = toy.out / "stage2" / "lora.safetensors"
    assert f"Wrote {adapter}." in done.output
    record = json.loads((toy.out / "record.json").read_text())
    assert list(record["stages"]) == ["stage1", "stage2"]
    merged = open_checkpoint(None, checkpoint, LoRA(adapter)).parts["dit"]
    plain = open_checkpoint(None, checkpoint).parts["dit"]
    preset = toy.config.system
    network = SharedBase(meta_dit(preset), LoRAConfig(1, 1.0), ("none",), recompute=False)
    network.fill(merged, torch.device("cpu"))
    base = open_base(toy.config, (GENERATOR,))
    role = base.role(GENERATOR)
    assert isinstance(role.module, Adapter)
    load_adapter(adapter, role.module)
    effect = relative_error(velocity(preset, base.role(None)), velocity(preset, role))
    rounded = relative_error(velocity(preset, network.role(None)), velocity(preset, role))
    assert rounded < 0.1 * effect  # merged weights are bfloat16, as the checkpoint's
    changed = [name for name in plain.shapes() if not torch.equal(plain.read(name), merged.read(name))]
    assert changed
    assert all(name.rpartition(".")[0].endswith(("q", "k", "v", "o", "ffn.0", "ffn.2")) for name in changed)
    again = toy("all")
    assert again.exit_code == 0, again.output


def test_stages_of_drawn_faces_are_not_of_a_checkpoint(toy: AdapterRun) -> None:
    done = toy("vae")
    assert done.exit_code == 2
    assert f"stage vae is not of {toy.path}, whose networks have the weights of a checkpoint; choose" in done.output


def test_stage_2_starts_from_the_adapter_of_stage_1(toy: AdapterRun) -> None:
    done = toy("stage2")
    assert done.exit_code == 2
    assert f"stage stage2 starts from {toy.out / 'stage1' / 'lora.safetensors'}, which does not exist" in done.output


def test_a_checkpoint_of_other_widths_is_refused(tmp_path: Path, checkpoint: Path, toy: AdapterRun) -> None:
    toy.path.write_text(toml(dataclasses.replace(toy.config, preset="s2v-14b")))
    done = toy("stage1")
    assert done.exit_code == 2
    assert f"{checkpoint} has dit dim {LEAST.dit.dim}, but preset s2v-14b has 5120" in done.output


def test_shards_of_another_size_are_refused(toy: AdapterRun) -> None:
    toy.path.write_text(toml(dataclasses.replace(toy.config, width=80)))
    done = toy("stage1")
    assert done.exit_code == 2
    assert "was made with latents" in done.output


def test_an_adapter_of_another_rank_is_refused(toy: AdapterRun) -> None:
    assert toy("stage1").exit_code == 0
    other = open_base(dataclasses.replace(toy.config, lora=LoRAConfig(3, 4.0)), (GENERATOR,)).role(GENERATOR)
    assert isinstance(other.module, Adapter)
    with pytest.raises(run.CheckpointError, match=r"has shape \(2, \d+\), expected \(3, \d+\); is it of another"):
        load_adapter(toy.out / "stage1" / "lora.safetensors", other.module)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"float32"', '"float16"', "key 'precision' is 'float16'; expected float32 or bfloat16."),
        ("shards = ", "# shards = ", "key 'data.shards' is missing; give the folder or URL that python -m training."),
        ("[stage2]\n", "[stage2.lora]\nrank = 1\nalpha = 1\n[stage2]\n", "key 'stage2.lora' is of runs from nothing;"),
        ("shard_ranks = 0", "shard_ranks = -1", "key 'shard_ranks' is -1; expected 0 or more."),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(toy: AdapterRun, old: str, new: str, said: str) -> None:
    toy.path.write_text(toy.path.read_text().replace(old, new))
    done = toy("stage1")
    assert done.exit_code == 2
    assert said in done.output


def test_the_shipped_configurations_have_the_numbers_of_the_paper() -> None:
    paper, node = (load(run.ROOT / "training" / "configs" / f"{name}.toml") for name in ("s2v_14b", "s2v_14b_node"))
    assert isinstance(paper, AdapterConfig)
    assert (paper.lora.rank, paper.lora.alpha) == (128, 64)
    assert (paper.stage1.steps, paper.stage2.steps, paper.stage1.batch) == (25_000, 2_500, 128)
    assert (paper.height, paper.width, paper.stage2.blocks * 12) == (720, 400, 84)
    changed = {
        "shard_ranks": 0,
        **{name: dataclasses.replace(getattr(paper, name), batch=8) for name in run.ADAPTER_STEPS},
    }
    assert node == dataclasses.replace(paper, **changed)
