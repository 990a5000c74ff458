"""What the measurement of memory counts, and what block-wise accumulation saves."""

from __future__ import annotations

import pytest
import torch

from tests.training.conftest import SMALL
from training.memory import LiveBytes, PeakBytes, measure, table

KIB = 1024


def test_every_tensor_counts_once_while_it_lives() -> None:
    with LiveBytes() as live:
        one = torch.zeros(256)
        view = one[10:].reshape(2, -1)
        assert live.peak == KIB
        two = torch.ones(256)
        assert live.peak == 2 * KIB
        del one, view, two
        three = torch.zeros(384)
        assert live.peak == 2 * KIB
        kept = three + 1
        assert live.peak == 3 * KIB
    del kept


def test_what_backward_passes_need_counts() -> None:
    weight = torch.ones(256, requires_grad=True)
    with LiveBytes() as live:
        made = weight.exp().exp()
        assert live.peak == 2 * KIB
        made.sum().backward()
    assert live.peak > 2 * KIB


@pytest.mark.slow
def test_accumulation_keeps_one_blocks_graph() -> None:
    """The plain loop's memory grows with every block, by what a block's graph takes; the other's hardly does."""
    plain, accumulated = (
        [measure(SMALL, blocks, accumulate).live_bytes for blocks in (4, 6, 8)] for accumulate in (False, True)
    )
    growth = plain[2] - plain[1]
    assert 0.8 < growth / (plain[1] - plain[0]) < 1.2
    assert accumulated[2] - accumulated[1] < 0.2 * growth


def test_the_table_has_a_row_for_every_number_of_blocks() -> None:
    peaks = [PeakBytes(n, way, n * 2**20, (n + way) * 2**20) for n in (2, 1) for way in (False, True)]
    assert table(peaks).splitlines()[2:] == ["| 1 | 1 | 1 | 1 | 2 |", "| 2 | 2 | 2 | 2 | 3 |"]
