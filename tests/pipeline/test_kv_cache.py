"""What the ring holds after each block."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from live_avatar.arrays import Array
from live_avatar.config import PRECISIONS, Preset
from live_avatar.graphs.contract import kv_names
from live_avatar.pipeline.kv_cache import KVRing
from live_avatar.runtime.host import host_zeros, numpy_dtype
from live_avatar.runtime.torch_runtime import to_torch
from live_avatar.weights.fp8 import saturate
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


def torch_zeros(shape: tuple[int, ...], dtype: str) -> Any:
    """As a runtime on a GPU gives them."""
    return torch.zeros(shape, dtype=getattr(torch, dtype))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_ring_in_fp8_holds_the_nearest_numbers_and_saturates(precision: str) -> None:
    """On a host and in torch's memory the same bits, and those of the quantizer with scale 1."""
    preset = preset_of(3).with_precision(precision).with_kv_cache_dtype("fp8")
    drawn = np.random.default_rng(1)
    shape = (1, preset.dit.num_heads, preset.stream.block_tokens, preset.dit.head_dim)
    outputs = {
        name: (300 * drawn.standard_normal(shape)).astype(numpy_dtype(precision))
        for name in kv_names("new", preset.dit.num_layers)
    }
    outputs["new_k.0"][0, 0, 0, :3] = 6e4, -6e4, 600
    host, other = KVRing(preset, host_zeros), KVRing(preset, torch_zeros)
    host.append(outputs)
    other.append({name: to_torch(array) for name, array in outputs.items()})
    for name, held in host.history().items():
        assert held.dtype == ml_dtypes.float8_e4m3fn
        expected = saturate(to_torch(outputs[name.replace("history", "new")]))
        assert torch.equal(to_torch(held).view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(other.history()[name].view(torch.uint8), expected.view(torch.uint8))  # type: ignore[attr-defined]
    assert host.history()["history_k.0"][0, 0, 0, :3].astype(np.float32).tolist() == [448, -448, 448]
