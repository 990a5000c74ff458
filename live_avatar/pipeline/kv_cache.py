"""The rolling key/value cache of one step of one session (spec section 5).

The window is L blocks with the current one; the ring stores the L - 1 past ones, because the step itself brings the
current block's keys and values. The reference also keeps the ring entry that it is about to overwrite; this ring takes
a quarter less memory. The runtime gives the memory, which may be a GPU's.

A ring in FP8 (`Preset.kv_cache_dtype`) needs no scale: a key has passed an RMSNorm, and e4m3fn keeps its precision from
2^-6 to 448 (docs/log.md).
"""

from __future__ import annotations

from live_avatar.arrays import Array, Arrays
from live_avatar.config import Preset
from live_avatar.graphs.contract import kv_names
from live_avatar.runtime import Allocator

LARGEST_FP8 = 448.0
"""Largest number of e4m3fn."""


class KVRing:
    """Keys (rotated) and values of the last `past_blocks` blocks in every layer."""

    def __init__(self, preset: Preset, zeros: Allocator) -> None:
        stream, dit = preset.stream, preset.dit
        self._entries = stream.past_blocks
        self._tokens = stream.block_tokens
        self._names = dict(zip(kv_names("new", dit.num_layers), kv_names("history", dit.num_layers), strict=True))
        shape = (1, dit.num_heads, self._entries * self._tokens, dit.head_dim)
        self._rings = {history: zeros(shape, preset.history_dtype) for history in self._names.values()}
        self._is_fp8 = preset.kv_cache_dtype == "fp8"
        self._written = 0

    def history(self) -> dict[str, Array]:
        """`history_k.0` ... [1, N, L, D] over the filled ring entries; order does not matter to attention."""
        filled = min(self._written, self._entries) * self._tokens
        return {name: ring[:, :, :filled] for name, ring in self._rings.items()}

    def append(self, outputs: Arrays) -> None:
        """Writes a block's `new_k.0` ... over the oldest ring entry. In FP8 they are rounded to the nearest number, and
        what is out of range becomes the largest one."""
        start = (self._written % self._entries) * self._tokens
        for new, history in self._names.items():
            self._rings[history][:, :, start : start + self._tokens] = self._in_range(outputs[new])
        self._written += 1

    def _in_range(self, array: Array) -> Array:
        """Clipped, because ml_dtypes would make NaN of larger numbers; a method that numpy and torch both have."""
        return array.clip(-LARGEST_FP8, LARGEST_FP8) if self._is_fp8 else array
