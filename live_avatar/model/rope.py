"""Rotary phases of block and sink tokens, from integers in float64 (spec section 4).

No table and no end: a phase is computed for the positions at hand, so a stream may run for ever. All functions are pure
numpy, so that a serving process needs no torch for them.

A phase array is float32 [2, L, n]: cosines, then sines, of L tokens and n pairs of one axis group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from live_avatar.arrays import Array
from live_avatar.config import FRAME_PACKING, PATCH

THETA = 10_000.0
REFERENCE_POSITION = 30  # the sink's temporal position in training and in the prefill


def pair_counts(head_dim: int) -> tuple[int, int, int]:
    """Complex pairs given to time, rows and columns; their sum is head_dim / 2."""
    spatial = head_dim // 6
    return head_dim // 2 - 2 * spatial, spatial, spatial


def _phase(positions: Array, pairs: int) -> Array:
    frequencies = THETA ** (-np.arange(pairs, dtype=np.float64) / pairs)
    angles = positions.astype(np.float64)[:, None] * frequencies
    return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)


def time_phase(positions: Array, head_dim: int) -> Array:
    """Phases [2, len(positions), n_t] of integer latent-frame positions, negative ones included."""
    return _phase(np.asarray(positions), pair_counts(head_dim)[0])


def space_phase(rows: Array, columns: Array, head_dim: int) -> Array:
    """Phases [2, L, n_h + n_w] of tokens at the given rows and columns."""
    _, n_rows, n_columns = pair_counts(head_dim)
    return np.concatenate([_phase(np.asarray(rows), n_rows), _phase(np.asarray(columns), n_columns)], axis=-1)


def sink_position(first_frame: int, distance: int) -> int:
    """Rolling position R of the reference for a block whose first latent frame is `first_frame`."""
    return max(REFERENCE_POSITION, first_frame + distance)


@dataclass(frozen=True)
class TokenGrid:
    """Integer positions of a group of tokens, each an array [L]."""

    frames: Array
    rows: Array
    columns: Array

    @classmethod
    def of(cls, frames: Array, rows: Array, columns: Array) -> TokenGrid:
        """Every combination, in the order frame, row, column."""
        grids = np.meshgrid(frames, rows, columns, indexing="ij")
        return cls(*(grid.reshape(-1) for grid in grids))

    def phase(self, head_dim: int) -> Array:
        """Full phases [2, L, head_dim / 2]."""
        return np.concatenate(
            [time_phase(self.frames, head_dim), space_phase(self.rows, self.columns, head_dim)], axis=-1
        )


def concatenate(*grids: TokenGrid) -> TokenGrid:
    return TokenGrid(*(np.concatenate([getattr(g, name) for g in grids]) for name in ("frames", "rows", "columns")))


def sampled(count: int, size: int) -> Array:
    """`count` integers spread over 0..size-1, exactly floor(i (size-1) / (count-1)) (mends quirk Q21)."""
    if count == 1:
        return np.zeros(1, dtype=np.int64)
    return np.arange(count, dtype=np.int64) * (size - 1) // (count - 1)


def frame_grid(latent_height: int, latent_width: int, frames: Array) -> TokenGrid:
    """Grid of whole latent frames at the given temporal positions."""
    return TokenGrid.of(np.asarray(frames), np.arange(latent_height // PATCH), np.arange(latent_width // PATCH))


def motion_grid(latent_height: int, latent_width: int) -> TokenGrid:
    """Grid of the packed motion tokens: newest frame, 2x group, 4x group."""
    rows, columns = latent_height // PATCH, latent_width // PATCH
    groups = []
    for group in FRAME_PACKING:
        group_rows, group_columns = group.grid(latent_height, latent_width)
        groups.append(
            TokenGrid.of(np.array(group.positions), sampled(group_rows, rows), sampled(group_columns, columns))
        )
    return concatenate(*groups)
