"""The command: every stage in turn to weights that stream, what it refuses, and what it passes over."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from live_avatar.assets import PORTRAIT
from live_avatar.config import PRESETS
from live_avatar.pipeline.generator import Generator
from live_avatar.runtime.torch_runtime import TorchRuntime
from live_avatar.weights.checkpoint import open_checkpoint
from live_avatar.weights.lora import LoRA
from tests.conftest import noise_speech
from tests.support.training import toml
from tests.training.conftest import toy_config
from training import run
from training.config import LoRAConfig

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "training" / "configs" / "smoke.toml"
pytestmark = pytest.mark.usefixtures("small")


class ToyRun:
    """A run in a folder."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.out = folder / "run"
        self.config = folder / "run.toml"
        self.configure(**changes)

    def configure(self, **changes: Any) -> None:
        self.config.write_text(toml(toy_config(**changes)))

    def command(self, stage: str) -> list[str]:
        return ["--config", str(self.config), "--stage", stage, "--out", str(self.out), "--threads", "1"]

    def __call__(self, stage: str) -> Result:
        return CliRunner().invoke(run.main, self.command(stage))

    def record(self, stage: str = "") -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.out / stage / "record.json").read_text())
        return record


@pytest.fixture
def toy(tmp_path: Path) -> ToyRun:
    return ToyRun(tmp_path)


@pytest.mark.slow
def test_all_stages_make_a_checkpoint_that_streams(toy: ToyRun) -> None:
    """With adapters, so that the merged network is what is left."""
    toy.configure(stage2=dataclasses.replace(toy_config().stage2, lora=LoRAConfig(2, 2.0)))
    done = toy("all")
    assert done.exit_code == 0, done.output
    assert f"Wrote {toy.out / 'weights'}." in done.output
    preset = PRESETS["small"]
    checkpoint = open_checkpoint(preset, toy.out / "weights")
    blocks = list(Generator(TorchRuntime(checkpoint)).generate(PORTRAIT.read_bytes(), "A man.", 0, noise_speech(0.96)))
    assert [block.frames.shape for block in blocks] == [(12, 64, 64, 3)] * 2
    record = toy.record()
    assert list(record["stages"]) == list(run.STEPS)
    assert all(facts["seconds"] > 0 for facts in record["stages"].values())
    assert record["config"]["seed"] == 0
    assert record["environment"]["torch"]
    merged = (toy.out / "stage2" / "dit.safetensors").read_bytes()
    assert merged != (toy.out / "stage1" / "dit.safetensors").read_bytes()
    stamp = (toy.out / "stage2" / "dit.safetensors").stat().st_mtime_ns
    base = toy.out / "base"
    base.mkdir()
    for file in (toy.out / "weights").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    (base / "dit.safetensors").write_bytes((toy.out / "stage1" / "dit.safetensors").read_bytes())
    adapted = open_checkpoint(preset, base, LoRA(toy.out / "stage2" / "lora.safetensors")).parts["dit"]
    for name in checkpoint.parts["dit"].shapes():
        assert adapted.read(name).float() == pytest.approx(checkpoint.parts["dit"].read(name).float(), abs=1e-6), name
    again = toy("all")
    assert again.exit_code == 0
    assert (toy.out / "stage2" / "dit.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("stage", "missing", "maker"),
    [
        ("mouths", "vae/vae.safetensors", "vae"),
        ("data", "mouths/vae.safetensors", "mouths"),
        ("teacher", "data/train/manifest.json", "data"),
        ("stage1", "data/train/manifest.json", "data"),
        ("stage2", "data/train/manifest.json", "data"),
    ],
)
def test_a_stage_without_what_it_starts_from_names_the_command(
    toy: ToyRun, stage: str, missing: str, maker: str
) -> None:
    done = toy(stage)
    assert done.exit_code == 2
    assert done.stderr == (
        f"Error: stage {stage} starts from {toy.out / missing}, which does not exist; make it first: "
        f"python -m training.run --config {toy.config} --stage {maker} --out {toy.out}\n"
    )


def test_a_stage_of_other_settings_is_refused_by_the_key(toy: ToyRun) -> None:
    assert toy("encoders").exit_code == 0
    toy.configure(encoders=dataclasses.replace(toy_config().encoders, steps=3))
    done = toy("encoders")
    assert done.exit_code == 2
    folder = toy.out / "encoders"
    assert done.stderr == (
        f"Error: {folder} was made with encoders.steps 2, but this run has 3; give its own, or remove {folder} to make "
        "it anew.\n"
    )
    (folder / "record.json").unlink()  # as if it had been interrupted
    assert (
        "checkpoint.pt was made with encoders.steps 2, but this run has 3; give the run's own" in toy("encoders").stderr
    )


def test_a_fault_of_the_configuration_ends_with_its_sentence(toy: ToyRun) -> None:
    toy.config.write_text(toy.config.read_text().replace("seed", "sed", 1))
    done = toy("vae")
    assert done.exit_code == 2
    assert done.stderr.startswith(f"Error: {toy.config}: there is no key 'sed'; the keys there are data,")


def test_a_folder_that_cannot_be_is_named(toy: ToyRun) -> None:
    toy.out.write_text("a file")
    done = toy("encoders")
    assert done.exit_code == 2
    assert done.stderr.startswith(f"Error: {toy.out}")
    assert "Traceback" not in done.output


def test_a_damaged_record_is_named(toy: ToyRun) -> None:
    assert toy("encoders").exit_code == 0
    (toy.out / "encoders" / "record.json").write_text("{}")
    done = toy("encoders")
    assert done.exit_code == 2
    assert "record.json is no record ('identity'); remove it and run the stage again." in done.stderr


def test_stages_of_small_networks_want_one_process(toy: ToyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.distributed, "world", lambda: 2)
    done = toy("vae")
    assert done.exit_code == 2
    assert "stage vae runs in one process, and this is one of 2; run it without torchrun: python -m" in done.stderr


@pytest.mark.slow
def test_the_shipped_smoke_run_makes_a_checkpoint_that_exports(tmp_path: Path) -> None:
    """As a user types it, with a Ctrl-C in its first stage."""
    command = [sys.executable, "-m", "training.run", "--config", str(SMOKE), "--stage", "all", "--out", "run"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "client")])}
    first = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    deadline_s = time.monotonic() + 120
    while not (tmp_path / "run" / "vae").exists() and time.monotonic() < deadline_s:
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    assert first.communicate(timeout=120)[1].endswith("Interrupted; the same command goes on from there.\n")
    assert first.returncode == 130
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=600)
    export = [sys.executable, "-m", "live_avatar.cli", "export", "--checkpoint", "run/weights", "--output", "artifacts"]
    subprocess.run(export, cwd=tmp_path, env=environment, check=True, timeout=300)
    assert (tmp_path / "artifacts" / "manifest.json").is_file()
