"""The metrics as a scrape of the real server shows them, and as the documentation says."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path

import numpy as np
import pytest

from live_avatar.arrays import Array
from live_avatar.serving.metrics import (
    METRICS,
    SESSIONS_ENDED,
    SESSIONS_REFUSED,
    EndCause,
    Kind,
    Metric,
    RefusalReason,
    read_series,
)
from live_avatar.serving.server import TritonServer
from live_avatar_client import AvatarSession
from live_avatar_client.protocol import BLOCK_SAMPLES, FRAMES_PER_BLOCK, SAMPLES_PER_FRAME
from tests.serving.support import STAGES, frames_of, metrics_page, scrape

TABLE = Path(__file__).parents[2] / "docs" / "operations.md"


def rows() -> list[Metric]:
    """The table of the documentation."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in TABLE.read_text().splitlines()]
    return [
        Metric(name.strip("`"), Kind(kind), text, tuple(filter(None, labels.split(", "))))
        for name, kind, labels, text in (row for row in cells if len(row) == 4 and row[0].startswith("`live_avatar_"))
    ]


def test_the_table_says_what_the_code_says() -> None:
    assert rows() == [Metric(m.name, m.kind, m.help, m.labels) for m in METRICS]


def test_a_scrape_has_the_tables_metrics_and_no_others(server: TritonServer) -> None:
    text = metrics_page(server)
    kinds = dict(re.findall(r"^# TYPE (live_avatar_\w+) (\w+)$", text, re.M))
    helps = dict(re.findall(r"^# HELP (live_avatar_\w+) (.*)$", text, re.M))
    assert kinds == {metric.name: metric.kind.value for metric in rows()}
    assert helps == {metric.name: metric.help for metric in rows()}
    for metric in rows():
        lines = [
            line for line in read_series(text) if re.fullmatch(rf"{metric.name}(_bucket|_sum|_count)?(\{{.*\}})?", line)
        ]
        assert lines, metric.name
        for line in lines:
            assert set(re.findall(r'(\w+)="', line)) - {"le"} == set(metric.labels), line


def test_names_follow_prometheus() -> None:
    """Counters end in _total, and times are in seconds."""
    for metric in METRICS:
        assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER), metric.name
        assert "_ms" not in metric.name
        assert bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM)
        assert list(metric.buckets) == sorted(metric.buckets)


@pytest.mark.parametrize(("metric", "reasons"), [(SESSIONS_ENDED, EndCause), (SESSIONS_REFUSED, RefusalReason)])
def test_the_help_names_every_reason(metric: Metric, reasons: type[StrEnum]) -> None:
    named = metric.help.partition("by reason: ")[2].removesuffix(".").split(", ")
    assert sorted(named) == sorted(reasons)


def test_every_reason_is_there_before_it_happens(server: TritonServer) -> None:
    found = scrape(server)
    for name, reasons in (("ended", EndCause), ("refused", RefusalReason)):
        for reason in reasons:
            assert f'live_avatar_sessions_{name}_total{{reason="{reason}"}}' in found


def test_a_session_moves_the_numbers(server: TritonServer, url: str, picture: bytes, speech: Array) -> None:
    before = scrape(server)
    with AvatarSession(url, image=picture, prompt="hello", seed=3) as session:
        frames = sum(len(block) for block in session.stream([speech]))
    after = scrape(server)
    blocks = -(-len(speech) // BLOCK_SAMPLES)
    moved = {name: after[name] - before.get(name, 0.0) for name in after}
    assert frames == -(-len(speech) // SAMPLES_PER_FRAME)
    assert moved["live_avatar_sessions_admitted_total"] == 1
    assert moved['live_avatar_sessions_ended_total{reason="completed"}'] == 1
    assert moved["live_avatar_frames_total"] == FRAMES_PER_BLOCK * blocks
    assert moved["live_avatar_latency_seconds_count"] == blocks
    assert moved["live_avatar_latency_seconds_sum"] > 0
    assert moved["live_avatar_first_block_seconds_count"] == 1
    assert 0 < moved["live_avatar_first_block_seconds_sum"] < moved["live_avatar_latency_seconds_sum"]
    assert moved["live_avatar_sink_updates_total"] == 1
    for stage in STAGES:
        assert moved[f'live_avatar_blocks_total{{stage="{stage}"}}'] == blocks
        assert moved[f'live_avatar_stage_busy_seconds_total{{stage="{stage}"}}'] > 0
        assert after[f'live_avatar_stage_starts_total{{stage="{stage}"}}'] == 1
        assert after[f'live_avatar_stage_failures_total{{stage="{stage}"}}'] == 0
    for stage in STAGES[1:]:  # those that keep work of an avatar
        hits, misses = (moved[f'live_avatar_avatar_cache_{w}_total{{stage="{stage}"}}'] for w in ("hits", "misses"))
        assert hits + misses == 1
    prepared = {
        avatar: moved[f'live_avatar_avatars_prepared_total{{avatar="{avatar}"}}'] for avatar in ("known", "new")
    }
    assert sum(prepared.values()) == 1
    assert moved["live_avatar_avatar_seconds_count"] == prepared["new"]
    assert after["live_avatar_known_avatars"] > 0
    limit = after["live_avatar_sessions_limit"]
    assert after["live_avatar_sessions_live"] + after["live_avatar_sessions_free"] == limit


def test_a_sink_is_prefilled_ahead_and_makes_the_same_frames(
    server: TritonServer, url: str, picture: bytes, speech: Array, expected: Array
) -> None:
    """With one block under way the new sink comes with block 2, and each step prefills it behind that."""
    before = scrape(server)
    with AvatarSession(url, image=picture, prompt="hello", seed=3, max_in_flight_blocks=1) as session:
        assert np.array_equal(frames_of(list(session.stream([speech]))), expected)
    after = scrape(server)
    for step in range(1, 5):
        series = f'live_avatar_sinks_ahead_total{{stage="dit_step_{step}"}}'
        assert after[series] - before.get(series, 0.0) == 1
