"""The gateway's own metrics, and the one page that shows them with those of Triton and the stages."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import aiohttp
import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from live_avatar.serving import metrics
from live_avatar.serving.metrics import EndCause, Kind, Metric, RefusalReason
from live_avatar.serving.served import Served

SCRAPE_LIMIT_S: Final = 5.0
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]


class GatewayMeter:
    """The series of `serving.metrics` that the gateway reports."""

    def __init__(self, served: Served) -> None:
        self._registry = CollectorRegistry()
        self._families = {metric.name: self._family(metric) for metric in metrics.GATEWAY_METRICS}
        info = asdict(served)
        self.set(metrics.SESSIONS_LIMIT, info.pop("max_sessions"))
        self.set(metrics.INFO, 1, **info)
        for refusal in RefusalReason:
            self.add(metrics.SESSIONS_REFUSED, 0, reason=refusal)
        for cause in EndCause:
            self.add(metrics.SESSIONS_ENDED, 0, reason=cause)
        for avatar in ("known", "new"):
            self.add(metrics.AVATARS_PREPARED, 0, avatar=avatar)

    def add(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        self._child(metric, labels).inc(value)

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        self._child(metric, labels).set(value)

    def observe(self, metric: Metric, value: float) -> None:
        self._child(metric, {}).observe(value)

    def text(self) -> str:
        return prometheus_client.generate_latest(self._registry).decode()

    def _family(self, metric: Metric) -> Any:
        if metric.kind is Kind.COUNTER:
            return Counter(metric.name, metric.help, metric.labels, registry=self._registry)
        if metric.kind is Kind.GAUGE:
            return Gauge(metric.name, metric.help, metric.labels, registry=self._registry)
        return Histogram(metric.name, metric.help, metric.labels, registry=self._registry, buckets=metric.buckets)

    def _child(self, metric: Metric, labels: dict[str, str]) -> Any:
        family = self._families[metric.name]
        return family.labels(**{name: str(value) for name, value in labels.items()}) if labels else family


async def triton_page(socket: Path) -> str:
    """Triton's metrics, from its Unix socket; empty while Triton does not answer."""
    timeout = aiohttp.ClientTimeout(SCRAPE_LIMIT_S)
    try:
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(socket)), timeout=timeout) as session,
            session.get("http://triton/metrics") as answer,
        ):
            return await answer.text() if answer.status == 200 else ""
    except (OSError, aiohttp.ClientError, TimeoutError):
        return ""
