"""The rolling key/value cache of one step of one session (spec section 5).

The window is L blocks with the current one; the ring stores the L - 1 past ones, because the step itself brings the
current block's keys and values. The reference also keeps the ring entry that it is about to overwrite; this ring takes
a quarter less memory. The runtime gives the memory, which may be a GPU's.
"""

from __future__ import annotations

from live_avatar.arrays import Array, Arrays
from live_avatar.config import Preset
from live_avatar.graphs.contract import kv_names
from live_avatar.runtime import Allocator


class KVRing:
    """Keys (rotated) and values of the last `past_blocks` blocks in every layer."""

    def __init__(self, preset: Preset, zeros: Allocator) -> None:
        stream, dit = preset.stream, preset.dit
        self._entries = stream.past_blocks
        self._tokens = stream.block_tokens
        self._names = dict(zip(kv_names("new", dit.num_layers), kv_names("history", dit.num_layers), strict=True))
        shape = (1, dit.num_heads, self._entries * self._tokens, dit.head_dim)
        self._rings = {history: zeros(shape, preset.precision) for history in self._names.values()}
        self._written = 0

    def history(self) -> dict[str, Array]:
        """`history_k.0` ... [1, N, L, D] over the filled ring entries; order does not matter to attention."""
        filled = min(self._written, self._entries) * self._tokens
        return {name: ring[:, :, :filled] for name, ring in self._rings.items()}

    def append(self, outputs: Arrays) -> None:
        """Writes a block's `new_k.0` ... over the oldest ring entry."""
        start = (self._written % self._entries) * self._tokens
        for new, history in self._names.items():
            self._rings[history][:, :, start : start + self._tokens] = outputs[new]
        self._written += 1
