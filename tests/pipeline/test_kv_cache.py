"""What the ring holds after each block."""

from __future__ import annotations

import numpy as np
import pytest

from live_avatar.arrays import Array
from live_avatar.config import Preset
from live_avatar.graphs.contract import kv_names
from live_avatar.pipeline.kv_cache import KVRing
from live_avatar.runtime.host import host_zeros
from tests.support.networks import SMALL

BLOCKS = 7


def preset_of(window: int) -> Preset:
    return SMALL.with_stream(window_blocks=window)


def block(preset: Preset, number: int) -> dict[str, Array]:
    """Keys and values of a block in which every number names block, tensor and token."""
    shape = (1, preset.dit.num_heads, preset.stream.block_tokens, preset.dit.head_dim)
    token = np.arange(preset.stream.block_tokens, dtype=np.float32)[:, None] / 1000
    names = kv_names("new", preset.dit.num_layers)
    return {name: np.full(shape, 100 * number + i, np.float32) + token for i, name in enumerate(names, start=1)}


@pytest.mark.parametrize("window", [2, 3, 4])
@pytest.mark.parametrize("count", range(BLOCKS + 1))
def test_the_ring_holds_exactly_the_last_blocks_of_the_window(window: int, count: int) -> None:
    preset = preset_of(window)
    blocks = [block(preset, number) for number in range(count)]
    ring = KVRing(preset, host_zeros)
    for outputs in blocks:
        ring.append(outputs)
    history = ring.history()
    assert list(history) == list(kv_names("history", preset.dit.num_layers))
    expected = range(max(0, count - (window - 1)), count)
    tokens = preset.stream.block_tokens
    for name, held in history.items():
        assert held.shape == (1, preset.dit.num_heads, len(expected) * tokens, preset.dit.head_dim)
        slots = {held[:, :, start : start + tokens].tobytes() for start in range(0, held.shape[2], tokens)}
        assert slots == {blocks[number][name.replace("history", "new")].tobytes() for number in expected}


def test_what_is_appended_is_copied() -> None:
    preset = preset_of(3)
    ring, outputs = KVRing(preset, host_zeros), block(preset, 1)
    ring.append(outputs)
    before = ring.history()["history_k.0"].copy()
    outputs["new_k.0"][:] = -1
    assert np.array_equal(ring.history()["history_k.0"], before)


def test_two_rings_share_nothing() -> None:
    preset = preset_of(3)
    first, second = KVRing(preset, host_zeros), KVRing(preset, host_zeros)
    first.append(block(preset, 1))
    assert all(held.shape[2] == 0 for held in second.history().values())
    second.append(block(preset, 2))
    assert np.array_equal(first.history()["history_v.0"], block(preset, 1)["new_v.0"])
