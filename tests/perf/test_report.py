"""Tables, pictures, and the README's table, which is what the command makes of the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from live_avatar.errors import InputError
from perf import report
from perf.figures import StageTimes
from perf.report import (
    DOCUMENTS,
    RESULTS,
    ROOT,
    Document,
    busy_picture,
    lines_picture,
    main,
    measured,
    table,
    with_table,
)

README, ALL_FIGURES = DOCUMENTS


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.path)
def test_a_document_has_the_table_of_the_results(document: Document) -> None:
    text = (ROOT / document.path).read_text()
    assert with_table(text, measured(RESULTS, document), document) == text, "run python -m perf.report"


def test_the_readme_has_four_figures() -> None:
    assert len(measured(RESULTS, README).splitlines()) == 2 + 4


def test_every_row_has_its_results() -> None:
    made = measured(RESULTS, ALL_FIGURES)
    missing = [row.what for row in report.ROWS if row.what not in made]
    assert not missing


def test_a_number_that_changes_changes_the_table(tmp_path: Path) -> None:
    document = json.loads((RESULTS / "single.json").read_text())
    document["figures"]["throughput"]["fps"] = 12.34
    (tmp_path / "single.json").write_text(json.dumps(document))
    assert "| 12.3 |" in measured(tmp_path, README)


def test_check_refuses_a_stale_readme_and_a_run_mends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    for document in DOCUMENTS:
        (tmp_path / document.path).write_text(f"before\n{document.begin}\nold\n{document.end}\nafter\n")
    readme = tmp_path / README.path
    monkeypatch.setattr(report, "ROOT", tmp_path)
    stale = CliRunner().invoke(main, ["--check"])
    assert stale.exit_code == 1
    assert "README.md has another table than perf/results/ makes; run python -m perf.report" in stale.output
    assert CliRunner().invoke(main).exit_code == 0
    assert CliRunner().invoke(main, ["--check"]).exit_code == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text


def test_a_readme_without_marks_is_refused() -> None:
    with pytest.raises(InputError, match=r"README.md must have the lines .* once each; put them where the table goes"):
        with_table("no marks", "table", README)


def test_a_table_has_every_number_by_its_place() -> None:
    said = table({"a": {"b": 1.5, "c": [1, 2]}, "many": list(range(9)), "rows": [{"d": None}]})
    assert [line.split() for line in said.splitlines()] == [
        ["a.b", "1.5"],
        ["a.c", "[1,", "2]"],
        ["many", "9", "values,", "0", "...", "8"],
        ["rows[0].d", "None"],
    ]


def test_pictures_are_small(tmp_path: Path) -> None:
    busy_picture({name: StageTimes(5, 0.1, 0.1, 0.4) for name in ("a", "b")}, tmp_path / "busy.png")
    lines_picture(tmp_path / "lines.png", "title", "x", "y", {"one": ([1.0, 2.0], [3.0, 4.0]), "two": ([1.0], [5.0])})
    for name in ("busy.png", "lines.png"):
        assert (tmp_path / name).stat().st_size < 60_000
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 500
