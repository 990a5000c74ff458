"""The plan against real steps, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from click.testing import CliRunner, Result

from live_avatar.config import PRESETS, Preset
from live_avatar.errors import ConfigError
from tests.support.training import toml
from tests.training.conftest import SMALL
from training import peaks, plan, roles
from training.config import AdapterConfig, DataConfig, DistillationStage, DiTStage, LoRAConfig
from training.lora import draw_factors
from training.memory import LiveBytes
from training.run import ROOT

BLOCKS = 3


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> AdapterConfig:
    """Adapters on the small preset, with a picture that makes activations the larger part."""
    monkeypatch.setitem(cast(dict[str, Preset], PRESETS), SMALL.name, SMALL)
    few = {"steps": 4, "batch": 1, "learning_rate": 1e-3, "blocks": BLOCKS, "motion_weight": 0.0, "ema": 0.9}
    return AdapterConfig(
        checkpoint="none",
        preset=SMALL.name,
        height=128,
        width=128,
        precision="float32",
        lora=LoRAConfig(2, 2.0),
        data=DataConfig(blocks=BLOCKS, shards="none"),
        stage1=DiTStage(**few),  # type: ignore[arg-type]
        stage2=DistillationStage(**few, fake_steps=1),  # type: ignore[arg-type]
    )


def drawn_base(config: AdapterConfig, names: tuple[str, ...]) -> roles.SharedBase:
    """As `open_base`, with random weights instead of a checkpoint's."""
    base = roles.empty_base(config, config.system, names)
    base.unit.to_empty(device="cpu")
    for parameter in base.network.parameters():
        parameter.data.normal_(std=0.05)
    for name in names:
        draw_factors(base.network, roles.generator(0, name), name)
    return base


@pytest.mark.parametrize("stage", ["stage1", pytest.param("stage2", marks=pytest.mark.slow)])
def test_the_plan_is_within_a_tenth_of_the_measured_peak(
    config: AdapterConfig, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps with the longest rollout among them; all storages of torch count, weights included.

    One clip, since the plan has the clip in use alone; on a GPU the others are on the host.
    """
    monkeypatch.setattr(peaks, "CLIPS", 1)
    monkeypatch.setattr(peaks, "open_base", drawn_base)
    planned = plan.make_plan(config, stage, 1, 1.0, 1.0).memory.total
    clips = peaks.noise_clips(config, stage)
    with LiveBytes() as live:
        made, _ = peaks.new_stage(config, stage, clips)
        average = peaks.EMA(made.modules, config.stage1.ema)
        for number in range(1, 5 if stage == "stage2" else 3):
            made.step(number)
            average.update(number)
    assert planned == pytest.approx(live.peak, rel=0.1)


@pytest.mark.slow
def test_a_deep_network_is_planned_from_cuts(config: AdapterConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = replace(SMALL, dit=replace(SMALL.dit, num_layers=6, audio_inject_layers=(0, 2, 5)))
    monkeypatch.setitem(cast(dict[str, Preset], PRESETS), SMALL.name, deep)
    cut = plan.make_plan(config, "stage1", 1, 1.0, 1.0)
    monkeypatch.setattr(plan, "SHALLOW", 6)
    whole = plan.make_plan(config, "stage1", 1, 1.0, 1.0)
    assert cut.clip_flops == whole.clip_flops
    assert cut.memory.activations == pytest.approx(whole.memory.activations, rel=0.05)


def test_numbers_that_do_not_divide_are_refused(config: AdapterConfig) -> None:
    with pytest.raises(ConfigError, match=r"a batch of 1 clips cannot be split evenly among 2 processes; make stage1"):
        plan.make_plan(config, "stage1", 2, 1.0, 1.0)
    wide = replace(config, shard_ranks=3, stage1=replace(config.stage1, batch=4))
    with pytest.raises(ConfigError, match=r"4 processes cannot be split evenly into groups of 3, which share one copy"):
        plan.make_plan(wide, "stage1", 4, 1.0, 1.0)


def test_shards_halve_what_is_held(config: AdapterConfig) -> None:
    wide = replace(config, stage1=replace(config.stage1, batch=2))
    one, two = (plan.make_plan(wide, "stage1", gpus, 1.0, 1.0).memory for gpus in (1, 2))
    assert two.moments == one.moments // 2
    assert one.base / 2 <= two.base < 0.52 * one.base
    assert (one.gathered, one.activations) == (0, two.activations)
    assert two.gathered > 0


@pytest.mark.slow
def test_a_plan_is_of_all_stages(config: AdapterConfig, tmp_path: Path) -> None:
    fits = planned(config, tmp_path, "--gpu-memory-gib", "1", "--reserve-gib", "0")
    assert fits.exit_code == 0, fits.output
    stages = json.loads(fits.stdout.splitlines()[-1])["stages"]
    assert [stage["stage"] for stage in stages] == ["stage1", "stage2"]


def test_a_run_that_does_not_fit_is_refused_with_the_sum(config: AdapterConfig, tmp_path: Path) -> None:
    refused = planned(config, tmp_path, "--gpu-memory-gib", "0.001", "--reserve-gib", "0.5")
    assert refused.exit_code == 2
    assert "Error: stage1 needs 0.5 GiB on each GPU, which has 0.0: base 0.0 + adapters 0.0 + moments" in refused.stderr
    assert "+ reserve 0.5 (the fullest pass is window). Take more GPUs for one copy of the base" in refused.stderr


def planned(config: AdapterConfig, folder: Path, *words: str) -> Result:
    path = folder / "run.toml"
    path.write_text(toml(config))
    return CliRunner().invoke(plan.main, ["--config", str(path), "--gpus", "1", *words])


@pytest.mark.slow
def test_the_run_of_the_paper_fits_gpus_of_80_gib() -> None:
    config = ROOT / "training" / "configs" / "s2v_14b.toml"
    done = CliRunner().invoke(plan.main, ["--config", str(config), "--gpus", "128", "--gpu-memory-gib", "80"])
    assert done.exit_code == 0, done.output


def test_a_plan_is_of_adapters(tmp_path: Path) -> None:
    tiny = ROOT / "training" / "configs" / "tiny.toml"
    done = CliRunner().invoke(plan.main, ["--config", str(tiny), "--gpus", "1"])
    assert done.exit_code == 2
    assert "tiny.toml has no key 'checkpoint'; a plan is of a run that trains adapters of one." in done.stderr


@pytest.mark.parametrize("option", ["--gpu-memory-gib", "--reserve-gib", "--tflops", "--utilisation"])
def test_a_plan_takes_finite_numbers(option: str) -> None:
    config = ROOT / "training" / "configs" / "s2v_14b_node.toml"
    done = CliRunner().invoke(plan.main, ["--config", str(config), "--gpus", "8", option, "nan"])
    assert done.exit_code == 2
    assert f"Invalid value for '{option}': nan is no finite number; give one." in done.stderr
