"""A meter that keeps the numbers, for stages without a server."""

from __future__ import annotations

from collections import defaultdict

from live_avatar.serving.metrics import Metric


class RecordingMeter:
    """`values` by metric name and labels, such as `live_avatar_frames_total` or `..._ended_total reason=silent`."""

    def __init__(self) -> None:
        self.values: defaultdict[str, float] = defaultdict(float)

    def declare(self, metric: Metric, **labels: str) -> None:
        self.values[_key(metric, labels)] += 0

    def add(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        self.values[_key(metric, labels)] += value

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        self.values[_key(metric, labels)] = value

    def observe(self, metric: Metric, value: float) -> None:
        self.values[f"{metric.name} count"] += 1

    def of(self, metric: Metric, **labels: str) -> float:
        return self.values[_key(metric, labels)]


def _key(metric: Metric, labels: dict[str, str]) -> str:
    assert set(labels) == set(metric.labels) - {"stage"}, f"{metric.name} has the labels {metric.labels}"
    return " ".join([metric.name, *(f"{name}={value}" for name, value in sorted(labels.items()))])
