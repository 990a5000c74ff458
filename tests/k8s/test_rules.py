"""The recording and alert rules: Prometheus' own tool plays each of them, and each has its page in the runbook.

Needs `promtool`; what the series are called on a real server is seen in test_rehearsal_prometheus.py.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from live_avatar.cli.main import serve
from live_avatar.serving.server_options import ServerOptions
from tests.k8s.observing import (
    K8S,
    MONITORING,
    alerts,
    deployment,
    metric_names,
    own_series,
    promtool,
    records,
    rule_groups,
    rules,
    write_rules,
)

CASES = Path(__file__).parent / "alerts.promtool.yaml"
OF_OTHERS = {
    "nv_inference_pending_request_count",  # Triton's
    "kube_pod_deletion_timestamp",  # kube-state-metrics'
    "kube_pod_init_container_status_running",
}


def played(folder: Path, groups: list[dict[str, Any]]) -> str:
    """What promtool has against the cases with these rules; of the annotations only the summary is compared."""
    for group in groups:
        for rule in group["rules"]:
            if "annotations" in rule:
                rule["annotations"] = {"summary": rule["annotations"]["summary"]}
    write_rules(folder / "rules.yaml", groups)
    shutil.copy(CASES, folder)
    result = promtool("test", "rules", folder / CASES.name)
    return "" if result.returncode == 0 else result.stdout + result.stderr


def broken(kind: str, expression: str) -> list[dict[str, Any]]:
    """The groups with another expression for every alert, or for every record."""
    groups = rule_groups()
    for group in groups:
        for rule in group["rules"]:
            if kind in rule:
                rule["expr"] = expression
    return groups


@pytest.mark.k8s
def test_prometheus_accepts_the_rules(tmp_path: Path) -> None:
    result = promtool("check", "rules", "--lint-fatal", write_rules(tmp_path / "rules.yaml", rule_groups()))
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(list(rules()))} rules found" in result.stdout


@pytest.mark.k8s
def test_every_rule_does_what_its_cases_say(tmp_path: Path) -> None:
    assert played(tmp_path, rule_groups()) == ""


@pytest.mark.k8s
def test_every_alert_has_a_case_in_which_it_fires(tmp_path: Path) -> None:
    said = played(tmp_path, broken("alert", "vector(1) == 0"))
    assert set(re.findall(r"alertname: (\w+), time: \S+,\s+exp:\[\s+0:", said)) == set(alerts())


@pytest.mark.k8s
def test_every_alert_has_a_case_in_which_it_does_not(tmp_path: Path) -> None:
    said = played(tmp_path, broken("alert", "vector(1)"))
    assert set(re.findall(r"alertname: (\w+), time: \S+,\s+exp:\[\],", said)) == set(alerts())


@pytest.mark.k8s
def test_every_record_has_a_case(tmp_path: Path) -> None:
    said = played(tmp_path, broken("record", "vector(1)"))
    failed = set().union(*map(metric_names, re.findall(r"^    expr: .*", said, re.M)))
    assert failed >= records()


def test_the_rules_ask_for_series_that_exist() -> None:
    asked = set().union(*(metric_names(rule["expr"]) for rule in rules()))
    assert asked <= own_series() | records() | OF_OTHERS
    assert asked >= OF_OTHERS


def test_the_alerts_about_pods_know_the_names_of_the_deployment() -> None:
    base = deployment()
    [engines] = [c["name"] for c in base["spec"]["template"]["spec"]["initContainers"]]
    assert f'container="{engines}"' in alerts()["LiveAvatarEngineRebuilt"]["expr"]
    for name in ("LiveAvatarEngineRebuilt", "LiveAvatarDrainStuck"):
        assert f'pod=~"{base["metadata"]["name"]}-.+"' in alerts()[name]["expr"]


def test_the_pod_monitor_finds_the_pods_and_their_port() -> None:
    template = deployment()["spec"]["template"]
    monitor = yaml.safe_load((MONITORING / "podmonitor.yaml").read_text())["spec"]
    assert monitor["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    [endpoint] = monitor["podMetricsEndpoints"]
    [server] = template["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    assert ports[endpoint["port"]] == ServerOptions(Path()).metrics_port


def test_every_alert_has_its_page_in_the_runbook() -> None:
    headings = re.findall(r"^## (\w+)", (K8S / "ALERTS.md").read_text(), re.M)
    assert headings == list(alerts())
    for name, rule in alerts().items():
        assert rule["annotations"]["runbook"] == f"k8s/ALERTS.md#{name.lower()}"
        assert rule["labels"]["severity"] in ("critical", "warning", "info")


def test_each_table_row_of_the_runbook_says_what_the_rule_says() -> None:
    """Severity, and how long it must have been so."""
    rows = re.findall(r"^\| \[(\w+)\]\(#\w+\) \| (\w+) \| ([\w ]+) \|", (K8S / "ALERTS.md").read_text(), re.M)
    assert rows == [(name, rule["labels"]["severity"], rule.get("for", "at once")) for name, rule in alerts().items()]


@pytest.mark.parametrize(
    ("sentence", "source"),
    [
        ("sessions of this server are taken", "live_avatar/gateway/admission.py"),
        ("the process of STAGE is gone", "live_avatar/serving/supervisor.py"),
        ("waiting for another process that builds engines", "live_avatar/exporter/engines.py"),
        ("has not been built", "live_avatar/graphs/engines.py"),
        ("the gateway has ended; starting it again", "live_avatar/serving/supervisor.py"),
        ("cause", "live_avatar/gateway/audit.py"),
    ],
)
def test_what_the_runbook_quotes_is_what_the_program_says(sentence: str, source: str) -> None:
    assert sentence in (K8S / "ALERTS.md").read_text()
    assert re.search(re.escape(sentence).replace("STAGE", "%s"), (K8S.parent / source).read_text())


def test_the_options_that_the_runbook_names_exist() -> None:
    named = set(re.findall(r"`(--[a-z-]+)`", (K8S / "ALERTS.md").read_text()))
    assert named
    assert named <= {name for option in serve.params for name in option.opts}
