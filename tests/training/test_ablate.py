"""The ablations: each row changes what it says, and the row of the method itself is the stream."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from live_avatar.model.dit import CausalDiT
from live_avatar.pipeline.generator import Generator
from live_avatar.runtime.torch_runtime import TorchRuntime
from live_avatar.weights.checkpoint import load_networks, open_checkpoint
from tests.support.training import toml
from tests.tolerances import OTHER_LEVEL_SHARE
from tests.training.conftest import SMALL, drawn_network, toy_config
from training import ablate
from training.ablate import CLEAN_TRAINED, Prepared, Studio, Variant, figures, measure, table, variants
from training.checkpoints import save_weights
from training.data.clips import Split, make_clip
from training.evaluate import GeneratedClip, png

BLOCKS = 6
"""One more than the block that sees the replaced sink."""


@dataclass(frozen=True)
class AblationFixture:
    """A run's folder with drawn networks, and what the command makes of it."""

    folder: Path
    studio: Studio
    prepared: Prepared
    dit: CausalDiT


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> AblationFixture:
    folder = tmp_path_factory.mktemp("run")
    parts = load_networks(open_checkpoint(SMALL)).parts()
    dit = drawn_network()
    for stage in ("stage1", "stage2"):
        save_weights(folder / stage / "dit.safetensors", dit.state_dict())
    for part, network in {**parts, "dit": dit}.items():
        save_weights(folder / "weights" / f"{part}.safetensors", network.state_dict())
    studio = Studio(SMALL, folder / "weights")
    return AblationFixture(folder, studio, studio.prepare(make_clip(Split.TEST, 1, BLOCKS, SMALL.stream.height)), dit)


def row(name: str) -> Variant:
    return next(one for one in variants(SMALL, clean_trained=True) if one.name == name)


@pytest.mark.slow
def test_the_first_row_is_the_stream(run: AblationFixture) -> None:
    clip = run.prepared.clip
    runtime = TorchRuntime(open_checkpoint(SMALL, run.folder / "weights"))
    blocks = Generator(runtime).generate(png(clip.picture), clip.prompt, 5, clip.speech)
    expected = np.concatenate([block.frames for block in blocks])
    made = run.studio.take(run.dit, row("as released"), run.prepared, 5, 0).frames
    assert made.shape == expected.shape
    difference = np.abs(made.astype(int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() <= OTHER_LEVEL_SHARE


@pytest.mark.parametrize(
    ("name", "nfe", "first_block", "same_blocks"),
    [
        ("without AAS", 4, 0, 4),
        ("without rolling RoPE", 4, 0, 1),
        ("clean KV", 5, 0, 1),
        ("without the idle step", 3, 0, 0),
        pytest.param("without distillation, 40 steps", 40, 0, 0, marks=pytest.mark.slow),
    ],
)
def test_a_row_changes_what_it_says(
    run: AblationFixture, name: str, nfe: int, first_block: int, same_blocks: int
) -> None:
    """And nothing before the block from which on it matters."""
    variant = row(name)
    assert variant.nfe == nfe
    released, other = (
        run.studio.take(run.dit, one, run.prepared, 5, first_block).frames.reshape(BLOCKS, -1)
        for one in (row("as released"), variant)
    )
    alike = [bool(np.array_equal(a, b)) for a, b in zip(released, other, strict=True)]
    assert alike == [True] * same_blocks + [False] * (BLOCKS - same_blocks)


def test_rows_say_which_network_they_take() -> None:
    plain, more = variants(SMALL, clean_trained=False), variants(SMALL, clean_trained=True)
    assert {one.network for one in plain} == {"stage1", "stage2"}
    assert [one.network for one in more[len(plain) :]] == [CLEAN_TRAINED] * 2
    assert len({one.name for one in more}) == len(more)


def test_figures_are_those_of_the_truth_for_the_truth() -> None:
    clips = [make_clip(Split.TEST, seed, BLOCKS) for seed in (1, 2, 3)]
    made = figures([GeneratedClip(clip, clip.frames) for clip in clips if clip.mouth[:, 0].std() > 0])
    assert made["opening"] > 0.9
    assert made["looks"] < 5
    assert made["last_looks"] < 5


def test_a_row_is_measured_at_both_places_over_seeds(run: AblationFixture) -> None:
    (made,) = measure(run.studio, {"stage2": run.dit}, [row("as released")], [run.prepared], seeds=2)
    assert (made["name"], made["network"], made["nfe"]) == ("as released", "stage2", 4)
    assert len(made["start"]["looks"]["each"]) == 2
    assert made["start"]["looks"]["each"] != made["late"]["looks"]["each"]
    lines = table([made]).splitlines()
    assert lines[0].startswith("| | NFE | opening | width | looks | last looks | opening, late |")
    assert lines[2].startswith("| as released | 4 | ")
    assert lines[2].count(" ± ") == 8


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_the_command_writes_its_report(run: AblationFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablate, "UNDISTILLED_STEPS", 6)
    config, report = tmp_path / "run.toml", tmp_path / "report.json"
    config.write_text(toml(toy_config()))
    options = ["--config", str(config), "--run", str(run.folder), "--clips", "2", "--blocks", "3", "--seeds", "1"]
    done = CliRunner().invoke(ablate.main, [*options, "--threads", "1", "--report", str(report)])
    assert done.exit_code == 0, done.output
    made = json.loads(report.read_text())
    assert [one["nfe"] for one in made["rows"]] == [4, 4, 4, 5, 3, 4, 6]
    assert json.loads(done.stdout.splitlines()[-1]) == made
    done = CliRunner().invoke(ablate.main, [*options[:3], str(tmp_path / "none"), *options[4:]])
    assert done.exit_code == 2
    assert "stage1/dit.safetensors does not exist; train it with --stage stage1" in done.stderr
