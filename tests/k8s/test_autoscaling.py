"""The autoscaler, played: the HPA's published algorithm on our own objects, and sessions that come and go.

The algorithm is that of an external metric with an average value (kube-controller-manager, 1.31 to 1.37): nothing
happens within 10 % of the target; else ceil(metric / target), the least of the window for growing, the greatest of that
for shrinking, as far as the policies let it.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
import yaml

from live_avatar.serving.profiles import load_profile
from tests.k8s.observing import AUTOSCALING, deployment, hpa, pods_wanted, rule

TOLERANCE = 0.1
SYNC_S = 15
START_S = 300
"""From a pod asked for to a pod that serves: a guess, for the order of magnitude."""
HOUR_S = 3600
MOST_WINDOW_S, MOST_PERIOD_S = 3600, 1800  # the API's own bounds


def recommended(pods: int, wanted: float) -> int:
    target = float(hpa()["metrics"][0]["external"]["target"]["averageValue"])
    return pods if abs(wanted / (target * pods) - 1) <= TOLERANCE else math.ceil(wanted / target)


@dataclass
class Autoscaler:
    """The controller with one policy in each direction."""

    pods: int = 1
    now_s: float = 0.0
    _asked: deque[tuple[float, int]] = field(default_factory=deque)
    _changed: list[tuple[float, int]] = field(default_factory=list)

    def step(self, wanted: float) -> int:
        asked = recommended(self.pods, wanted)
        self._asked.append((self.now_s, asked))
        up, down = hpa()["behavior"]["scaleUp"], hpa()["behavior"]["scaleDown"]
        least, greatest = min(self._within(up)), max(self._within(down))
        pods = least if least > self.pods else greatest if greatest < self.pods else self.pods
        pods = min(pods, self.pods + max(0, up["policies"][0]["value"] - self._moved(up, 1)))
        pods = max(pods, self.pods - max(0, down["policies"][0]["value"] - self._moved(down, -1)))
        pods = min(max(pods, hpa()["minReplicas"]), hpa()["maxReplicas"])
        if pods != self.pods:
            self._changed.append((self.now_s, pods - self.pods))
        self.pods = pods
        self.now_s += SYNC_S
        return pods

    def _within(self, rules: dict[str, Any]) -> list[int]:
        """Recommendations of the window, the latest among them."""
        since_s = self.now_s - rules["stabilizationWindowSeconds"]
        return [asked for at_s, asked in self._asked if at_s > since_s or at_s == self.now_s]

    def _moved(self, rules: dict[str, Any], sign: int) -> int:
        """By how many pods it has gone that way within the policy's period."""
        since_s = self.now_s - rules["policies"][0]["periodSeconds"]
        return sum(abs(change) for at_s, change in self._changed if at_s > since_s and change * sign > 0)


@dataclass
class Played:
    refused: int
    pods: list[int]
    """At every sync."""


def play(sessions: list[tuple[float, float]], slots: int, until_s: float) -> Played:
    """Sessions (begin, end) on servers that grow and shrink; a pod serves `START_S` after it was asked for."""
    scaler, refused, history = Autoscaler(), 0, [1]
    ready_at_s = [0.0]
    live: list[float] = []
    coming = deque(sorted(sessions))
    while scaler.now_s < until_s:
        now_s = scaler.now_s
        live = [end_s for end_s in live if end_s > now_s]
        while coming and coming[0][0] <= now_s:
            if len(live) < slots * sum(ready <= now_s for ready in ready_at_s):
                live.append(coming.popleft()[1])
            else:
                coming.popleft()
                refused += 1
        pods = scaler.step(pods_wanted(len(live), slots))
        ready_at_s = ready_at_s[:pods] + [now_s + START_S] * (pods - len(ready_at_s))
        history.append(pods)
    return Played(refused, history)


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_a_full_fleet_of_any_size_grows(slots: int) -> None:
    assert all(recommended(pods, pods_wanted(slots * pods, slots)) > pods for pods in range(1, 100))


def test_without_the_share_of_the_spare_a_large_fleet_would_stay_full() -> None:
    """What the 15 % are for: one spare slot alone is within the tolerance of a fleet of more than ten."""
    grows = [pods for pods in range(1, 100) if recommended(pods, pods + 1) > pods]
    assert grows == list(range(1, 11))


@pytest.mark.parametrize("slots", [1, 4])
def test_sessions_that_come_one_by_one_always_find_a_slot(slots: int) -> None:
    apart_s = START_S + 120
    sessions = [(apart_s * number, 3 * HOUR_S) for number in range(1, slots * hpa()["maxReplicas"])]
    assert play(sessions, slots, 2.5 * HOUR_S).refused == 0


def test_two_that_come_while_a_pod_starts_need_a_second_spare_slot() -> None:
    """What one spare slot cannot do, and the comment says so."""
    assert play([(600, HOUR_S), (660, HOUR_S)], 1, HOUR_S).refused == 1


def test_a_session_of_half_a_minute_starts_no_pod() -> None:
    assert set(play([(600, 630)], 1, HOUR_S).pods) == {1}


def test_pods_go_one_by_one_and_late() -> None:
    sessions = [(600.0 * number, 2 * HOUR_S) for number in range(1, 4)]
    pods = play(sessions, 1, 6 * HOUR_S).pods
    falls_s = [SYNC_S * (at - 1) for at in range(1, len(pods)) if pods[at] < pods[at - 1]]
    down = hpa()["behavior"]["scaleDown"]
    assert max(pods) == 4
    assert pods[-1] == hpa()["minReplicas"]
    assert len(falls_s) == 3
    assert falls_s[0] >= 2 * HOUR_S + down["stabilizationWindowSeconds"] - SYNC_S
    gaps_s = [after - before for before, after in itertools.pairwise(falls_s)]
    assert min(gaps_s) >= down["policies"][0]["periodSeconds"]


def test_sessions_that_come_every_few_minutes_move_no_pods() -> None:
    sessions = [(600.0 * number, 600.0 * number + 300) for number in range(1, 48)]
    pods = play(sessions, 1, 8 * HOUR_S).pods
    assert [number for at, number in enumerate(pods) if at == 0 or pods[at - 1] != number] == [1, 2]


def test_the_table_s_numbers() -> None:
    text = (AUTOSCALING / "rules.yaml").read_text()
    rows = re.findall(r"^#   (\w+) +(\d) +(\d+ -> .*)$", text, re.M)
    assert [name for name, _, _ in rows] == ["gpux5", "cpu"]
    for profile, slots, cells in rows:
        assert load_profile(profile).max_sessions == int(slots)
        for live, wanted, replicas in re.findall(r"(\d+) -> ([\d.]+) -> (\d+)", cells):
            assert pods_wanted(int(live), int(slots)) == pytest.approx(float(wanted))
            assert math.ceil(float(wanted)) == int(replicas)


def test_hpa_rule_and_adapter_speak_of_one_metric() -> None:
    adapter = yaml.safe_load((AUTOSCALING / "prometheus-adapter.yaml").read_text())
    [external] = adapter["rules"]["external"]
    assert hpa()["metrics"][0]["external"]["metric"]["name"] == rule()["record"]
    assert external["seriesQuery"] == rule()["record"] + '{namespace!=""}'
    assert re.fullmatch(r"[a-z_]+", rule()["record"]), "a part of a path"


def test_the_behaviour_is_within_the_bounds_of_the_api() -> None:
    for rules in hpa()["behavior"].values():
        assert 0 <= rules["stabilizationWindowSeconds"] <= MOST_WINDOW_S
        assert len(rules["policies"]) == 1
        assert 0 < rules["policies"][0]["periodSeconds"] <= MOST_PERIOD_S


def test_the_hpa_alone_says_how_many() -> None:
    assert "replicas" not in deployment()["spec"]


def test_no_pod_goes_before_the_one_before_it_has_drained() -> None:
    grace_s = deployment()["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert hpa()["behavior"]["scaleDown"]["policies"][0]["periodSeconds"] >= grace_s
