"""The Grafana dashboard as a file: its queries are PromQL, ask for series that exist, and its panels lie side by side.

That each query has an answer on a real server is seen in test_rehearsal_prometheus.py.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from tests.k8s.observing import (
    dashboard,
    filled,
    metric_names,
    own_series,
    panels,
    promtool,
    queries,
    records,
    rules,
    write_rules,
)

TRITON = {
    "nv_inference_pending_request_count",
    "nv_gpu_utilization",
    "nv_gpu_memory_used_bytes",
    "nv_gpu_power_usage",
}
COLUMNS = 24


@pytest.mark.k8s
def test_every_query_is_promql(tmp_path: Path) -> None:
    recorded = [{"record": f"query_{number}", "expr": query} for number, query in enumerate(queries().values())]
    result = promtool("check", "rules", write_rules(tmp_path / "queries.yaml", [{"name": "all", "rules": recorded}]))
    assert result.returncode == 0, result.stdout + result.stderr
    broken = [{"record": "query", "expr": "sum(live_avatar_sessions_free"}]
    assert promtool("check", "rules", write_rules(tmp_path / "x.yaml", [{"name": "x", "rules": broken}])).returncode


def test_every_query_asks_for_series_that_exist() -> None:
    assert queries()
    for title, query in queries().items():
        assert metric_names(query), title
        assert metric_names(query) <= own_series() | records() | TRITON, title


def test_nothing_is_recorded_that_nobody_asks_for() -> None:
    asked = set().union(*map(metric_names, [*queries().values(), *(rule["expr"] for rule in rules())]))
    assert asked >= records()


def test_every_variable_is_declared_and_used() -> None:
    declared = {variable["name"] for variable in dashboard()["templating"]["list"]}
    expressions = [target["expr"] for panel in panels() for target in panel["targets"]]
    used = set(re.findall(r"\$\{?(\w+)", str(dashboard()))) - {"__rate_interval", "__all"}
    assert used == declared
    for expression in expressions:
        assert "$namespace" in expression
        assert "$" not in filled(expression)


def test_every_label_of_a_legend_is_kept_by_its_query() -> None:
    for panel in panels():
        for target in panel["targets"]:
            kept = re.search(r"by \(([\w, ]+)\)", target["expr"])
            legend = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert legend <= set(kept[1].split(", ") if kept else ()), panel["title"]


def test_panels_lie_side_by_side() -> None:
    everything = dashboard()["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in everything)
        for x, y in itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        )
    ]
    assert len(set(cells)) == len(cells), "two panels share a place"
    assert all(0 <= x < COLUMNS for x, _ in cells)


def test_every_panel_has_a_title_of_its_own_and_the_chosen_data_source() -> None:
    titles = [panel["title"] for panel in panels()]
    assert len(set(titles)) == len(titles)
    for panel in panels():
        for holder in (panel, *panel["targets"]):
            assert holder["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
