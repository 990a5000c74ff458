"""`python -m perf.run`: what it writes and prints, and how it ends; and the scenarios themselves, briefly (slow)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from live_avatar.errors import InputError
from live_avatar.graphs.artifacts import Artifacts
from perf import run
from perf.run import SCENARIOS, main
from perf.scenario import Context, Figures, Scenario, broken, check

MOST_BYTES = 100_000


def measuring(value: float) -> Callable[[Context], Figures]:
    def measure(context: Context) -> Figures:
        return {"value": value, "quick": context.quick, "checks": [check("the value", value, at_least=1.0)]}

    return measure


@pytest.fixture
def scenarios(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {
        name: Scenario(name, f"for the test: {name}", measuring(value)) for name, value in (("good", 1.5), ("bad", 0.5))
    }
    monkeypatch.setattr(run, "SCENARIOS", made)


def invoked(artifacts: Artifacts, out: Path, *words: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, [*words, "--artifacts", str(artifacts.folder), "--out", str(out)])
    return result.exit_code, result.stdout


@pytest.mark.usefixtures("scenarios")
def test_a_run_leaves_its_document_and_says_where(artifacts: Artifacts, tmp_path: Path) -> None:
    code, said = invoked(artifacts, tmp_path, "good", "--quick")
    assert code == 0, said
    assert said.splitlines()[-1] == str(tmp_path / "good.json")
    document = json.loads((tmp_path / "good.json").read_text())
    assert document["command"] == "python -m perf.run good --quick"
    assert document["figures"]["value"] == 1.5
    assert document["figures"]["quick"] is True
    assert document["artifacts"]["fingerprint"] == artifacts.fingerprint
    assert {"date", "commit", "environment"} <= set(document)
    assert str(tmp_path) not in json.dumps(document)


@pytest.mark.usefixtures("scenarios")
def test_what_does_not_hold_is_said_and_the_exit_code_is_1(artifacts: Artifacts, tmp_path: Path) -> None:
    code, said = invoked(artifacts, tmp_path, "bad", "good")
    assert code == 1
    assert "DOES NOT HOLD: the value is 0.5, must be at least 1" in said
    assert (tmp_path / "good.json").exists(), "the others are run all the same"


def test_an_unknown_scenario_is_refused_with_the_list(artifacts: Artifacts, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["singel", "--artifacts", str(artifacts.folder), "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "there is no scenario 'singel'" in result.output
    assert all(name in result.output for name in SCENARIOS)


def test_without_a_name_it_lists_them(artifacts: Artifacts, tmp_path: Path) -> None:
    code, said = invoked(artifacts, tmp_path)
    assert code == 0
    assert all(name in said for name in ("single", "realtime", "sessions", "start", "long"))


def test_checks() -> None:
    assert broken({"checks": [check("a", 1.0, at_least=1.0), check("b", 1.0, at_most=1.0)]}) == []
    assert broken({"checks": [check("b", 1.2, at_most=1.1)]}) == ["b is 1.2, must be at most 1.1"]
    assert broken({}) == []


def test_options_are_not_for_a_server_of_others(tmp_path: Path) -> None:
    context = Context(tmp_path, tmp_path, url="localhost:8001")
    with (
        pytest.raises(InputError, match=r"needs a server with its own stage_floor_s; leave --url out"),
        context.server(stage_floor_s=0.1),
    ):
        pass
    with context.server() as target:
        assert target.metrics_url == "http://localhost:8002/metrics"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["single", "realtime", "sessions", "start", "long", "pipeline"])
@pytest.mark.usefixtures("real_program")
def test_a_scenario_in_brief(name: str, artifacts: Artifacts, tmp_path: Path) -> None:
    """On a busy machine something may not hold (exit code 1); the figures must be there all the same."""
    code, said = invoked(artifacts, tmp_path, name, "--quick")
    assert code in (0, 1), said
    document = json.loads((tmp_path / f"{name}.json").read_text())
    assert document["figures"]["checks"]
    for path in tmp_path.glob("*.png"):
        assert path.stat().st_size < MOST_BYTES
        with Image.open(path) as picture:
            assert picture.width > 500
