"""The figures of GPUs that people own: the document has those of the results, and their memory is that of the code."""

from __future__ import annotations

import json

import pytest

from live_avatar.config import S2V_14B
from live_avatar.serving.profiles import load_profile
from perf.owned_gpus import CASES, Case, table
from perf.report import RESULTS
from perf.scenarios.schedule import sessions_by_memory
from tests.support.repository import ROOT

FOUND = json.loads((RESULTS / "owned_gpus.json").read_text())["cases"]


def test_the_document_has_the_table_of_the_results() -> None:
    assert f"\n{table(FOUND)}\n" in (ROOT / "docs" / "rtx.md").read_text()


@pytest.mark.parametrize(("case", "found"), list(zip(CASES, FOUND, strict=True)), ids=lambda value: "")
def test_sessions_are_those_that_fit(case: Case, found: dict[str, object]) -> None:
    preset = S2V_14B.with_precision("bfloat16").with_stream(width=case.size[0], height=case.size[1])
    fitting = sessions_by_memory(load_profile(case.profile), case.memory_gib, preset)
    ways = [fits for way, fits in fitting.items() if way.startswith(str(found["precision"]))]
    assert found["sessions_by_memory"] == ways[1] >= ways[0]
