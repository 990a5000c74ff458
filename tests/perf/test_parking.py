"""Sums of parked sessions against those of the stages."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from live_avatar.config import S2V_14B
from live_avatar.graphs.memory import GIB
from live_avatar.serving.profiles import load_profile
from perf.parking import main, parked, session_bytes

SIXTEEN = S2V_14B.with_precision("bfloat16")


def test_a_gpu_with_one_step_parks_a_ring_and_a_sink() -> None:
    held = session_bytes(load_profile("gpux5"), SIXTEEN)
    assert sorted(held) == [0, 1, 2, 3, 4]
    assert sorted(held.values())[1:] == [pytest.approx(9.65 * GIB, rel=0.01)] * 4
    assert max(session_bytes(load_profile("gpux1"), SIXTEEN).values()) > 4 * 7.25 * GIB


def test_fp8_caches_come_back_sooner_and_more_of_them_need_not_go() -> None:
    wide, narrow = (
        parked(load_profile("gpux5"), SIXTEEN.with_kv_cache_dtype(dtype), fp8=True) for dtype in (None, "fp8")
    )
    assert wide.back_s == pytest.approx(0.162, rel=0.01)
    assert narrow.back_s < 0.65 * wide.back_s
    assert narrow.sessions_on_the_gpus > wide.sessions_on_the_gpus


def test_the_command_prints_a_row_for_each_case() -> None:
    rows = CliRunner().invoke(main).stdout.splitlines()
    assert [row.split()[:2] for row in rows[1:]] == [
        [profile, dtype] for profile in ("gpux1", "gpux5") for dtype in ("bfloat16", "fp8")
    ]
