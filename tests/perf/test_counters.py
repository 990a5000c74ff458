"""What the server did between two pages of its metrics."""

from __future__ import annotations

import pytest

from live_avatar.serving.metrics import read_series
from perf.counters import PARTS, statistics


def page(count: int, microseconds: int, busy: float) -> dict[str, float]:
    lines = [f'nv_inference_request_success{{model="m",version="1"}} {count}']
    lines += [f'nv_inference_{part}_duration_us{{model="m",version="1"}} {microseconds}' for part in PARTS]
    lines += [
        f'live_avatar_stage_busy_seconds_total{{stage="m"}} {busy}',
        'nv_inference_request_success{model="idle"} 3',
    ]
    return read_series("\n".join(lines))


def test_means_are_of_what_came_in_between() -> None:
    found = statistics(page(10, 5_000, 1.0), page(14, 13_000, 1.5))["models"]
    assert set(found) == {"m"}
    assert found["m"]["requests"] == 4
    assert found["m"]["queue_ms"] == pytest.approx(2.0)
    assert found["m"]["busy_s"] == pytest.approx(0.5)


def test_histogram_of_first_responses_where_there_is_one() -> None:
    series = 'nv_inference_first_response_histogram_ms_count{model="m",version="1"}'
    assert statistics(page(1, 1, 0.0), page(2, 2, 0.0))["first_response_histogram_ms"] is None
    after = {**page(2, 2, 0.0), series: 4.0}
    assert statistics(page(1, 1, 0.0), after)["first_response_histogram_ms"] == {series: 4.0}
