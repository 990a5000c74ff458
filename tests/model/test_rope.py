"""Positions and phases: the spec's numbers, and no end of time."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest

from live_avatar.config import S2V_14B
from live_avatar.model import rope
from tests.tolerances import PHASE

PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")


def exact_angle(position: int, index: int, pairs: int) -> float:
    """position * 10000^(-index / pairs) reduced to one turn, in 60 decimal digits."""
    with localcontext() as context:
        context.prec = 60
        frequency = (Decimal(10_000).ln() * Decimal(-index) / Decimal(pairs)).exp()
        return float((Decimal(position) * frequency) % (2 * PI))


@pytest.mark.parametrize(("head_dim", "pairs"), [(128, (22, 21, 21)), (64, (12, 10, 10)), (32, (6, 5, 5))])
def test_pairs_of_time_rows_and_columns(head_dim: int, pairs: tuple[int, int, int]) -> None:
    assert rope.pair_counts(head_dim) == pairs
    assert sum(pairs) == head_dim // 2


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [
        (4, 8, [0, 2, 4, 7]),
        (6, 24, [0, 4, 9, 13, 18, 23]),
        (3, 12, [0, 5, 11]),
        (2, 5, [0, 4]),
        (1, 7, [0]),
    ],
)
def test_sampled_positions_of_the_spec(count: int, size: int, expected: list[int]) -> None:
    assert rope.sampled(count, size).tolist() == expected


@pytest.mark.parametrize("latent", [238, 239])
def test_sampling_is_exact_where_the_reference_is_off_by_one(latent: int) -> None:
    count, size = latent // 4, latent // 2
    assert count == 59
    positions = rope.sampled(count, size).tolist()
    assert positions == [i * (size - 1) // 58 for i in range(59)]
    assert positions[29] == 59  # quirk Q21: floating point gives 58


@pytest.mark.parametrize(
    ("first_frame", "distance", "position"),
    [(0, 30, 30), (3, 30, 33), (0, 4, 30), (24, 4, 30), (26, 4, 30), (27, 4, 31), (3 * 10**9, 10, 3 * 10**9 + 10)],
)
def test_the_sink_waits_at_30_and_then_rolls(first_frame: int, distance: int, position: int) -> None:
    assert rope.sink_position(first_frame, distance) == position


@pytest.mark.parametrize("position", [0, 1, 29, 30, 44_999, 45_000, 10**6, 10**9, -1, -19])
@pytest.mark.parametrize("head_dim", [32, 128])
def test_time_phases_are_exact_at_any_position(position: int, head_dim: int) -> None:
    pairs = rope.pair_counts(head_dim)[0]
    cosine, sine = rope.time_phase(np.array([position]), head_dim)[:, 0]
    angles = [exact_angle(position, index, pairs) for index in range(pairs)]
    np.testing.assert_allclose(cosine, [math.cos(angle) for angle in angles], rtol=0, atol=PHASE)
    np.testing.assert_allclose(sine, [math.sin(angle) for angle in angles], rtol=0, atol=PHASE)


def test_two_neighbouring_frames_after_a_year_still_differ() -> None:
    first = 25 * 3600 * 24 * 366 // 4
    early, late = rope.time_phase(np.array([first, first + 1]), 128)[:, :, 0].T
    turn = math.atan2(late[1] * early[0] - late[0] * early[1], late[0] * early[0] + late[1] * early[1])
    assert turn == pytest.approx(1.0, abs=PHASE)  # pair 0 turns by one radian a frame


def test_a_grid_counts_frame_then_row_then_column() -> None:
    grid = rope.frame_grid(4, 6, np.array([7, 8]))
    assert grid.frames.tolist() == [7] * 6 + [8] * 6
    assert grid.rows.tolist() == [0, 0, 0, 1, 1, 1] * 2
    assert grid.columns.tolist() == [0, 1, 2] * 4


def test_a_phase_is_time_then_rows_then_columns() -> None:
    grid = rope.TokenGrid.of(np.array([5]), np.array([3]), np.array([2]))
    cosine, _ = grid.phase(32)[:, 0]
    assert grid.phase(32).shape == (2, 1, 16)
    first_pairs = [cosine[0], cosine[6], cosine[11]]  # frequency 1 of each axis
    np.testing.assert_allclose(first_pairs, [math.cos(5), math.cos(3), math.cos(2)], rtol=0, atol=PHASE)


def test_motion_tokens_of_the_14b_picture() -> None:
    stream = S2V_14B.stream
    grid = rope.motion_grid(stream.latent_height, stream.latent_width)
    groups = {-1: 44 * 24, -3: 22 * 12, **dict.fromkeys((-19, -14, -9, -4), 11 * 6)}
    frames, counts = np.unique(grid.frames, return_counts=True)
    assert dict(zip(frames.tolist(), counts.tolist(), strict=True)) == groups
    assert list(dict.fromkeys(grid.frames.tolist())) == [-1, -3, -19, -14, -9, -4]
    assert grid.frames.size == stream.sink_tokens - stream.frame_tokens
    assert (grid.rows.max(), grid.columns.max()) == (43, 23)
