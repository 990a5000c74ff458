"""The comparison of schedules runs on the golden rollout, and starts from the golden latents themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from perf.steps import Difference, main
from tests.tolerances import ROLLOUT

RESULTS = Path(__file__).parents[2] / "perf" / "results" / "steps.json"


@pytest.mark.slow
def test_the_report(tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    result = CliRunner().invoke(main, ["--json", str(path)])
    assert result.exit_code == 0, result.output
    *shown, last = result.stdout.splitlines()
    report = json.loads(last)
    assert report == json.loads(path.read_text())
    assert report["four_steps_from_golden_max_abs"] <= ROLLOUT
    dropped, *others = report["results"]
    assert dropped["sigmas"][-2:] == [0.602150559425354, 0.0]
    assert len(dropped["blocks"]) == 8
    assert all(0 < block["relative_rms"] < 0.02 for block in dropped["blocks"]), (
        "the idle step moves less than 1 % of v"
    )
    assert [len(other["sigmas"]) - 1 for other in others] == [3, 2, 8]
    assert min(other["all_blocks"]["relative_rms"] for other in others) > 10 * dropped["all_blocks"]["relative_rms"]
    assert len([line for line in shown if line.startswith("|")]) == 2 + len(report["results"])
    committed = json.loads(RESULTS.read_text())
    assert committed.keys() == report.keys()
    for ours, theirs in zip(report["results"], committed["results"], strict=True):
        assert ours["all_blocks"]["relative_rms"] == pytest.approx(theirs["all_blocks"]["relative_rms"], rel=1e-3)


def test_a_difference_is_relative_to_what_it_is_compared_with() -> None:
    found = Difference.between(np.float32([3.0, -4.0]), np.float32([3.0, -2.0]))
    assert found.max_abs == 2.0
    assert found.relative_rms == pytest.approx((2.0**2 / (3.0**2 + 2.0**2)) ** 0.5)
    assert Difference.between(np.ones(3), np.ones(3)) == Difference(0.0, 0.0)


def test_a_folder_without_golden_data_is_a_sentence(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--golden", str(tmp_path)])
    assert result.exit_code == 1
    assert "config.json" in result.output
