"""A real Prometheus on two servers, with our rules: an alert fires and clears, and every query has an answer.

Only `for` is cut, to a second. What the Prometheus operator and Grafana make of our files is not seen here.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from live_avatar.graphs.artifacts import Artifacts
from live_avatar.serving.server_options import free_ports
from live_avatar_client import AvatarSession
from tests.cli.support import wait_until
from tests.conftest import noise_speech
from tests.k8s.observing import alerts, queries, records, rule_groups, write_rules
from tests.k8s.programs import program
from tests.k8s.rehearsal import Prometheus, Server, started, two_servers, write_configuration
from tests.serving.support import spoken

pytestmark = pytest.mark.k8s

NEEDS_A_GPU = "nv_gpu_"


@pytest.fixture(scope="module")
def servers(artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """Of one session each, as on H800."""
    with two_servers(tmp_path_factory.mktemp("servers"), artifacts, "--max-sessions", 1) as both:
        yield both


@pytest.fixture(scope="module")
def prometheus(servers: tuple[Server, Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    groups = rule_groups()
    for group in groups:
        for rule in group["rules"]:
            if "for" in rule:
                rule["for"] = "1s"
    ports = {f"{name}_metrics": server.options.metrics_port for name, server in zip("ab", servers, strict=True)}
    rules = write_rules(folder / "rules.yaml", groups)
    configuration = write_configuration("prometheus.yaml", folder, rules=rules, **ports)
    [port] = free_ports(1)
    command = (
        program("prometheus"),
        f"--config.file={configuration}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    )
    with started(folder / "prometheus.log", *command, port=port):
        running = Prometheus(port)
        wait_until(running.is_ready)
        wait_until(lambda: [series["value"][1] for series in running.query("up")] == ["1", "1"])
        yield running


def test_no_free_slot_fires_and_clears(prometheus: Prometheus, servers: tuple[Server, Server], picture: bytes) -> None:
    assert "LiveAvatarNoFreeSlot" not in prometheus.firing()
    assert wanted(prometheus) == 1.0
    with ExitStack() as stack:
        for server in servers:
            session = stack.enter_context(AvatarSession(server.options.url, image=picture))
            spoken(session, noise_speech(0.48))
        wait_until(lambda: "LiveAvatarNoFreeSlot" in prometheus.firing())
        assert wanted(prometheus) == 3.0
    wait_until(lambda: "LiveAvatarNoFreeSlot" not in prometheus.firing())
    wait_until(lambda: wanted(prometheus) == 1.0)


def wanted(prometheus: Prometheus) -> float:
    """What the autoscaler would be told."""
    wait_until(lambda: prometheus.query("live_avatar_pods_wanted"))
    [series] = prometheus.query("live_avatar_pods_wanted")
    assert series["metric"]["namespace"] == "live-avatar"
    return float(series["value"][1])


def test_every_query_of_the_dashboard_has_an_answer(
    prometheus: Prometheus, servers: tuple[Server, Server], picture: bytes
) -> None:
    for server in servers:
        with AvatarSession(server.options.url, image=picture) as session:
            list(session.stream([noise_speech(2.0)]))
    found: dict[str, list[float]] = {}

    def unanswered() -> list[str]:
        asked = {title: query for title, query in queries().items() if NEEDS_A_GPU not in query}
        found.update({t: [float(s["value"][1]) for s in prometheus.query(query)] for t, query in asked.items()})
        return [title for title, values in found.items() if not values or not all(map(math.isfinite, values))]

    wait_until(lambda: not unanswered() and found["Free slots A"] == [2.0])
    assert found["Servers A"] == [2.0]
    assert max(found["Work of a stage for one block A"]) > 0
    assert max(found["First frame: the server's part B"]) > 0


def test_a_stage_that_dies_is_seen(prometheus: Prometheus, servers: tuple[Server, Server]) -> None:
    assert "LiveAvatarStageRestarted" not in prometheus.firing()
    os.kill(servers[1].process_of("dit_step_2"), signal.SIGKILL)
    wait_until(lambda: "LiveAvatarStageRestarted" in prometheus.firing())
    [series] = prometheus.query('ALERTS{alertname="LiveAvatarStageRestarted", alertstate="firing"}')
    assert (series["metric"]["pod"], series["metric"]["stage"]) == ("live-avatar-b", "dit_step_2")


def test_a_gateway_that_dies_is_seen(prometheus: Prometheus, servers: tuple[Server, Server]) -> None:
    assert "LiveAvatarGatewayRestarted" not in prometheus.firing()
    os.kill(servers[1].gateway(), signal.SIGKILL)
    wait_until(lambda: "LiveAvatarGatewayRestarted" in prometheus.firing())
    [series] = prometheus.query('ALERTS{alertname="LiveAvatarGatewayRestarted", alertstate="firing"}')
    assert series["metric"]["pod"] == "live-avatar-b"


def test_prometheus_could_evaluate_every_rule(prometheus: Prometheus) -> None:
    rules = prometheus.rules()
    assert {rule["name"] for rule in rules} == set(alerts()) | records()
    assert [rule["lastError"] for rule in rules if rule.get("lastError")] == []
    assert {rule["health"] for rule in rules} == {"ok"}
    # Those about speed are right on a machine that has other work.
    [speed] = [group["rules"] for group in rule_groups() if group["name"] == "live-avatar.speed"]
    assert prometheus.firing() - {rule["alert"] for rule in speed} <= {
        "LiveAvatarStageRestarted",
        "LiveAvatarGatewayRestarted",
    }
