"""Rotary phases of block and sink tokens, from integers in float64 (spec section 4).

No table and no end: a phase is computed for the positions at hand, so a stream may run for ever. All functions are pure
numpy, so that a serving process needs no torch for them.

A phase array is float32 [2, L, n]: cosines, then sines, of L tokens and n pairs of one axis group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from live_avatar.arrays import Array
from live_avatar.config import FRAME_PACKING, PATCH, StreamConfig

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


class TokenPhases:
    """Phases of a stream's tokens [2, L, D/2]: those of space are computed once, those of time for the positions."""

    def __init__(self, stream: StreamConfig, head_dim: int) -> None:
        height, width = stream.latent_height, stream.latent_width
        frame, motion = frame_grid(height, width, np.zeros(1)), motion_grid(height, width)
        self._head_dim = head_dim
        self._tokens = stream.frame_tokens
        self._frame_space = space_phase(frame.rows, frame.columns, head_dim)
        self._motion = motion.phase(head_dim)

    def block(self, first: int, frames: int) -> Array:
        """Phases of `frames` latent frames from number `first` on."""
        time = np.repeat(time_phase(np.arange(first, first + frames), self._head_dim), self._tokens, axis=1)
        return np.concatenate([time, np.tile(self._frame_space, (1, frames, 1))], axis=-1)

    def sink(self, position: int = REFERENCE_POSITION) -> Array:
        """Phases of the sink, with its reference at `position`; motion tokens keep their positions (quirk Q8)."""
        return np.concatenate([self.block(position, 1), self._motion], axis=1)

    def sink_turn(self, position: int) -> Array:
        """Phases that rotate the keys of the sink from their positions in the prefill to the reference's `position`.

        Rotations add up, so they are those of the difference in time, and turn nothing else.
        """
        turn = np.zeros_like(self.sink())
        turn[0] = 1
        time = time_phase(np.array([position - REFERENCE_POSITION]), self._head_dim)
        turn[:, : self._tokens, : time.shape[-1]] = time
        return turn
