"""Runs the torch networks over golden inputs: the sink, and blocks through a four-slot ring.

The ring here is the reference's (window slots, the block in slot b mod 4), kept apart from the project's own
`KVRing` on purpose: it is what the golden data describes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from live_avatar.model import rope
from live_avatar.model.attention import rotate
from live_avatar.model.audio import AudioTokens
from live_avatar.model.dit import KV, CausalDiT, Conditions


@dataclass
class Geometry:
    """Sizes of the golden run."""

    height: int
    width: int
    frames: int
    window: int
    head_dim: int

    @classmethod
    def of(cls, config: dict[str, Any], dit: CausalDiT) -> Geometry:
        run = config["run"]
        return cls(run["lat_h"], run["lat_w"], run["frames_per_block"], run["blocks_per_ring"], dit.config.head_dim)

    def block_phase(self, block: int) -> Tensor:
        frames = np.arange(block * self.frames, (block + 1) * self.frames)
        return torch.from_numpy(rope.frame_grid(self.height, self.width, frames).phase(self.head_dim))

    def sink_phase(self, position: int) -> Tensor:
        grid = rope.concatenate(
            rope.frame_grid(self.height, self.width, np.array([position])),
            rope.motion_grid(self.height, self.width),
        )
        return torch.from_numpy(grid.phase(self.head_dim))

    def sink_turn(self, position: int) -> Tensor:
        """From the positions of the prefill to those with the reference at `position`."""
        (cosine, sine), (to_cosine, to_sine) = self.sink_phase(rope.REFERENCE_POSITION), self.sink_phase(position)
        return torch.stack([to_cosine * cosine + to_sine * sine, to_sine * cosine - to_cosine * sine])

    def not_rotated(self, key: Tensor) -> Tensor:
        """Keys of the sink [1, N, L, D] as they were before the prefill rotated them."""
        cosine, sine = self.sink_phase(rope.REFERENCE_POSITION)
        return rotate(key, torch.stack([cosine, -sine]))


def padded_text(dit: CausalDiT, context: Tensor) -> Tensor:
    missing = dit.config.text_len - context.shape[0]
    return torch.cat([context, context.new_zeros(missing, context.shape[1])])


def audio_tokens(dit: CausalDiT, states: Tensor) -> AudioTokens:
    """[K, A, 12] of one speaker."""
    local, global_tokens = dit.casual_audio_encoder(states)
    return AudioTokens(local[None], global_tokens[None])


@dataclass
class Trace:
    """A sequence of blocks at one step: its sink and its ring."""

    dit: CausalDiT
    geometry: Geometry
    timestep: float
    text: KV
    sink: KV
    slots: list[KV | None] = field(default_factory=list)

    def history(self, block: int) -> KV:
        size = self.geometry.window
        kept = [kv for i, kv in enumerate(self.slots) if kv is not None and i != block % size]
        empty = [(k[:, :, :0], v[:, :, :0]) for k, v in self.sink]
        return [
            tuple(torch.cat([layer[part] for layer in pair], dim=2) for part in (0, 1))  # type: ignore[misc]
            for pair in zip(*([*kept, empty]), strict=True)
        ]

    def run(self, block: int, latent: Tensor, audio: AudioTokens, distance: int, pose: Tensor | None = None) -> Tensor:
        """Velocity [1, 16, F, h, w]; writes the ring."""
        if not self.slots:
            self.slots = [None] * self.geometry.window
        position = rope.sink_position(block * self.geometry.frames, distance)
        velocity, written = self.dit.denoise(
            latent,
            Conditions(self.text, self.sink, [self.history(block)], audio),
            self.dit.modulation(self.timestep),
            self.geometry.block_phase(block),
            self.geometry.sink_turn(position),
            pose,
        )
        self.slots[block % self.geometry.window] = written
        return velocity


def prefill(dit: CausalDiT, geometry: Geometry, context: Tensor, reference: Tensor, motion: Tensor) -> tuple[KV, KV]:
    """Text and sink keys and values."""
    text = dit.text_kv(padded_text(dit, context))
    phase = geometry.sink_phase(rope.REFERENCE_POSITION)
    return text, dit.prefill(reference, motion, text, dit.modulation(0.0), phase)


def token_major(kv: Tensor) -> Tensor:
    """[1, N, L, D] -> [1, L, N, D], the golden files' layout."""
    return kv.transpose(1, 2)
