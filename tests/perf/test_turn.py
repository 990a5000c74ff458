"""The times of turns, from blocks whose times are known."""

from __future__ import annotations

import numpy as np
import pytest

from live_avatar.errors import ServerError
from perf.figures import BUFFER_S
from perf.scenarios.turn import Heard, turns

BLOCK = 12 * 640


def heard(received_s: float, first: int | None = None, last: int = BLOCK - 1) -> Heard:
    """A block of silence, or one with speech from sample `first` to `last`."""
    audio = np.zeros(BLOCK, np.int16)
    if first is not None:
        audio[[first, last]] = 1
    return Heard(12, received_s, audio)


def test_a_turn_is_seen_when_its_frame_is_shown() -> None:
    blocks = [
        heard(1.0),
        heard(1.48, first=3 * 640 + 5),
        heard(1.96, first=0, last=7),
        heard(2.44),
        heard(2.92, first=0),
    ]
    found = turns(blocks, [1.3, 2.8])
    assert found.stalled_s == []
    assert [turn.received_s for turn in found.found] == pytest.approx([0.18, 0.12])
    assert [turn.shown_s for turn in found.found] == pytest.approx([0.18 + BUFFER_S + 0.12, 0.12 + BUFFER_S])


def test_a_late_block_stops_the_player() -> None:
    found = turns([heard(1.0), heard(1.9), heard(2.1, first=0)], [2.0])
    assert found.stalled_s == pytest.approx([1.9 - (1.48 + BUFFER_S)])
    assert [turn.shown_s for turn in found.found] == pytest.approx([1.9 + 0.48 - 2.0])


def test_a_short_pause_in_speech_begins_no_turn() -> None:
    blocks = [heard(1.0, first=0, last=100), heard(1.48, first=300), heard(1.96)]
    assert len(turns(blocks, [0.9]).found) == 1


@pytest.mark.parametrize("begun_s", [[], [0.9, 1.4]])
def test_turns_that_are_lost_or_cut_are_told(begun_s: list[float]) -> None:
    with pytest.raises(ServerError, match=f"{len(begun_s)} turns were spoken, and the frames show 1; the server lost"):
        turns([heard(1.0, first=0, last=100), heard(1.48)], begun_s)
