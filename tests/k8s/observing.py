"""What the tests of monitoring share: the rules and the dashboard as they stand in k8s/, and Prometheus' own tools."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from live_avatar.serving.metrics import METRICS, Kind
from tests.k8s.manifests import K8S
from tests.k8s.programs import program

MONITORING = K8S / "components" / "monitoring"
AUTOSCALING = K8S / "components" / "autoscaling"
VARIABLES = {"namespace": "live-avatar", "pod": ".+", "__rate_interval": "1m"}
"""Values for the variables of the dashboard."""

Rule = dict[str, Any]


def promtool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [program("promtool"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def rule_groups() -> list[dict[str, Any]]:
    """Of both PrometheusRules, as a rule file of Prometheus has them."""
    files = (MONITORING / "rules.yaml", AUTOSCALING / "rules.yaml")
    return [group for file in files for group in yaml.safe_load(file.read_text())["spec"]["groups"]]


def rules() -> Iterator[Rule]:
    for group in rule_groups():
        yield from group["rules"]


def alerts() -> dict[str, Rule]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def records() -> set[str]:
    return {rule["record"] for rule in rules() if "record" in rule}


def own_series() -> set[str]:
    """What a query may ask for: of a histogram its buckets."""
    return {metric.name + ("_bucket" if metric.kind is Kind.HISTOGRAM else "") for metric in METRICS}


def write_rules(path: Path, groups: list[dict[str, Any]]) -> Path:
    path.write_text(yaml.safe_dump({"groups": groups}))
    return path


def deployment() -> dict[str, Any]:
    """The base's."""
    found: dict[str, Any] = yaml.safe_load((K8S / "base" / "deployment.yaml").read_text())
    return found


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MONITORING / "dashboard.json").read_text())
    return found


def panels() -> list[dict[str, Any]]:
    """Those that show something; not the titles of the rows."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def queries() -> dict[str, str]:
    """Queries of the dashboard by title of the panel and letter, with values in place of the variables."""
    targets = ((panel["title"], target) for panel in panels() for target in panel["targets"])
    return {f"{title} {target['refId']}": filled(target["expr"]) for title, target in targets}


def filled(query: str) -> str:
    for name, value in VARIABLES.items():
        query = re.sub(rf"\$\{{?{name}\b\}}?", value, query)
    return query


def metric_names(expression: str) -> set[str]:
    """Names of the series that an expression asks for: of Triton's, of kube-state-metrics', recorded ones and ours."""
    without_labels = re.sub(r"\{[^}]*\}", "", expression)
    return set(re.findall(r"\b(?:nv_|kube_|live_avatar_|\w+:)[\w:]+", without_labels))


@cache
def hpa() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((AUTOSCALING / "hpa.yaml").read_text())["spec"]
    return found


@cache
def rule() -> dict[str, str]:
    [group] = yaml.safe_load((AUTOSCALING / "rules.yaml").read_text())["spec"]["groups"]
    [found] = group["rules"]
    return dict(found)


def pods_wanted(live: int, slots: int) -> float:
    """The rule's expression, with its own numbers."""
    spare = re.search(
        r"clamp_min\(([\d.]+) \* sum by \(namespace\) \(live_avatar_sessions_live\), ([\d.]+)\)", rule()["expr"]
    )
    assert spare is not None
    return (live + max(float(spare[1]) * live, float(spare[2]))) / slots
