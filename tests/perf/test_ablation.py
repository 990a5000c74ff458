"""Rows and ratios of the ablation on hand-made times, and the artifacts that it exports."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path

import pytest
from PIL import Image

from live_avatar.errors import InputError
from live_avatar.graphs.artifacts import MANIFEST, Artifacts
from live_avatar.serving.profiles import load_profile
from perf.figures import BlockTimes
from perf.scenarios.ablation import (
    ONE_BLOCK,
    SETUPS,
    SHARED_DECODER,
    STEPS,
    TPP,
    generated,
    picture,
    row,
    with_ratio,
)
from perf.variants import variant


def blocks(first_s: float, every_s: float) -> list[BlockTimes]:
    received = accumulate([first_s, *[every_s] * 9])
    return [BlockTimes(12, 0.0, 0.0, 0.0, at) for at in received]


def test_a_row_and_its_ratio() -> None:
    tpp = row(TPP, "", blocks(1.2, 0.2))
    alone = with_ratio(row(ONE_BLOCK, "", blocks(1.2, 1.2)), tpp)
    assert tpp["ttff_s"] == pytest.approx(1.2)
    assert tpp["steady_fps"] == pytest.approx(60.0)
    assert tpp["fps"] == pytest.approx(120 / 3.0)
    assert alone["by_tpp"] == pytest.approx(1 / 6)


def stages(profile: str) -> set[str]:
    return {place.name for place in load_profile(profile).chain}


def test_every_row_names_stages_that_its_profile_has() -> None:
    assert SETUPS[0].name == TPP
    for setup in SETUPS:
        assert set(setup.share) <= stages(setup.profile), setup.name
    assert set(STEPS) == {place.name for place in load_profile("cpu").chain if place.steps}
    assert next(s for s in SETUPS if s.name == SHARED_DECODER).share == ("dit_step_4", "vae_decoder")


def test_the_generator_alone_makes_blocks_one_after_another(artifacts: Artifacts) -> None:
    seen = generated(artifacts.folder, 3)
    assert [block.frames for block in seen] == [12, 12, 12]
    times = [block.received_s for block in seen]
    assert times == sorted(times)
    assert times[0] > seen[0].sent_s


def test_a_variant_that_is_there_is_not_exported_again(artifacts: Artifacts, tmp_path: Path) -> None:
    for name in ("tiny", "tiny-same"):
        (tmp_path / name).symlink_to(artifacts.folder)
    assert variant(tmp_path / "tiny", "same").folder == tmp_path / "tiny-same"


def test_a_variant_of_weights_that_are_not_here_is_refused(artifacts: Artifacts, tmp_path: Path) -> None:
    for path in artifacts.folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    manifest["weights"]["dit"] = {"files": {"dit.safetensors": "0" * 64}}
    (tmp_path / MANIFEST).unlink()
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(
        InputError, match=r"holds weights of other files; give artifacts of the preset's own \(preset tiny\)"
    ):
        variant(tmp_path, "3-steps", steps=3)


def test_the_picture_has_a_bar_for_every_row(tmp_path: Path) -> None:
    rows = {setup.name: row(setup.name, "", blocks(1.0, 0.1 * (n + 2))) for n, setup in enumerate(SETUPS)}
    picture(rows, tmp_path / "ablation.png")
    with Image.open(tmp_path / "ablation.png") as drawn:
        assert drawn.width > 600
