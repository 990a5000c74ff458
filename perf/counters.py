"""The server's own numbers over a period: executions, waits and computation of each model, from Triton's `/metrics`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from live_avatar.serving.metrics import BUSY, read_series
from live_avatar.serving.supervisor import WITHOUT_PROXY

SERIES = re.compile(r'(\w+)\{(?:.*,)?(?:model|stage)="(\w+)"')
PARTS = ("queue", "compute_input", "compute_infer", "compute_output", "request")
FIRST_RESPONSE = "nv_inference_first_response_histogram_ms"
"""In Triton from 24.12 on, if `--metrics-config histogram_latencies=true`; not in the 2.51 of the wheel."""

Page = Mapping[str, float]


def scrape(metrics_url: str) -> dict[str, float]:
    with WITHOUT_PROXY.open(metrics_url, timeout=10) as page:
        return read_series(page.read().decode())


@contextmanager
def watched(metrics_url: str) -> Iterator[Callable[[], dict[str, Any]]]:
    """Returns a function that returns the server's numbers since this call."""
    before = scrape(metrics_url)
    yield lambda: statistics(before, scrape(metrics_url))


def statistics(before: Page, after: Page) -> dict[str, Any]:
    """By model: executions, and the mean milliseconds of each part of a request; for a stage also its busy seconds.

    compute_input and compute_output are Triton's copies to and from a stage's process.
    """
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    named = {match.groups(): value for name, value in grown.items() if (match := SERIES.match(name))}
    models = [model for (family, model), count in named.items() if family == "nv_inference_request_success" and count]
    found: dict[str, Any] = {}
    for model in sorted(models):
        count = named["nv_inference_request_success", model]
        times = {f"{part}_ms": named[f"nv_inference_{part}_duration_us", model] / count / 1e3 for part in PARTS}
        busy = named.get((BUSY.name, model))
        found[model] = {"requests": int(count), **times, **({} if busy is None else {"busy_s": busy})}
    first = {name: value for name, value in grown.items() if name.startswith(FIRST_RESPONSE) and value}
    return {"models": found, "first_response_histogram_ms": first or None}
