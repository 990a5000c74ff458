"""Passes of the transformer over a window of a stream: over the whole window, for the teacher, or block by block.

`Window` joins the core's network with positions, sink and history; gradients flow through all of it. A `Scene` has the
results of a network for a clip's conditions, which all blocks and noise levels share.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from live_avatar.arrays import Array
from live_avatar.config import FPS, Preset, StreamConfig
from live_avatar.model import rope
from live_avatar.model.audio import AudioTokens
from live_avatar.model.dit import KV, CausalDiT, Conditions
from training.encoded import CPU, EncodedClip
from training.flow import chance, timestep

FAR_HOURS = 10
"""Latest time of a window in a stream. The motion tokens stay at the start of the stream (quirk Q8), so their distance
from a block grows, up to the period of the slowest rotation: 36 minutes for TINY."""
LEAST_DISTANCE = 4  # of the sink from the block, in latent frames; the prefill uses the largest (section 4)


@dataclass(frozen=True)
class Place:
    """Position of a window in its stream: the number of its first block, and the distance of the sink."""

    first_block: int
    distance: int


def draw_place(first_block: int, far_share: float, stream: StreamConfig, draw: torch.Generator) -> Place:
    """A place at `first_block`, or in `far_share` of the draws at a log-uniform time up to `FAR_HOURS`."""
    distance = int(torch.randint(LEAST_DISTANCE, rope.REFERENCE_POSITION + 1, (), generator=draw))
    if chance(far_share, draw):
        last = math.log(FAR_HOURS * 3600 * FPS / stream.block_frames)
        first_block = round(math.exp(torch.rand((), generator=draw).item() * last))
    return Place(first_block, distance)


def part(clip: EncodedClip, start: int, blocks: int) -> EncodedClip:
    """The clip's `blocks` blocks from `start` on."""
    frames = clip.latents.shape[2] // len(clip.states)
    stop = start + blocks
    latents = clip.latents[:, :, start * frames : stop * frames]
    return dataclasses.replace(clip, states=clip.states[start:stop], latents=latents)


def unspoken(clip: EncodedClip) -> EncodedClip:
    """The clip without its speech, for guidance: features of 0, as in the original, which no sound gives.

    Features of silence are not used, because they mean a closed mouth.
    """
    return dataclasses.replace(clip, states=torch.zeros_like(clip.states))


def moved_to(clip: EncodedClip, device: torch.device) -> EncodedClip:
    """The clip with its tensors on a device."""
    return dataclasses.replace(
        clip,
        reference=clip.reference.to(device),
        motion=clip.motion.to(device),
        text=clip.text.to(device),
        states=clip.states.to(device),
        latents=clip.latents.to(device),
    )


class Scene(NamedTuple):
    """A network's results for a clip's conditions.

    text, sink: keys and values of every layer; late_sink: of the sink after its replacement, empty for none.
    local [F, n + 1, C], global_tokens [F, C]: audio tokens of all F latent frames of the window.
    """

    text: KV
    sink: KV
    late_sink: KV
    local: Tensor
    global_tokens: Tensor

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Scene:
        """The scene with `change` applied to every tensor."""

        def pairs(kv: KV) -> KV:
            return [(change(key), change(value)) for key, value in kv]

        text, sink, late_sink = pairs(self.text), pairs(self.sink), pairs(self.late_sink)
        return Scene(text, sink, late_sink, change(self.local), change(self.global_tokens))

    def audio(self, start: int, stop: int) -> AudioTokens:
        """Tokens of the latent frames from `start` to `stop`."""
        return AudioTokens(self.local[None, start:stop], self.global_tokens[None, start:stop])


class Window:
    """Windows of `blocks` blocks of a preset's streams.

    `rolls` False keeps the sink at its position in the prefill, for the ablation of the rolling RoPE.
    """

    def __init__(self, preset: Preset, blocks: int, device: torch.device = CPU, rolls: bool = True) -> None:
        self.stream = preset.stream
        self.device = device
        self.blocks = blocks
        self.frames = blocks * self.stream.frames_per_block
        self._rolls = rolls
        self._head_dim = preset.dit.head_dim
        self._phases = rope.TokenPhases(self.stream, self._head_dim)

    @property
    def late_index(self) -> int | None:
        """First block of a window with a replaced sink, counted from 0; None if there is none.

        Every window counts from its own start, as if the stream began there.
        """
        update = self.stream.sink_update_block
        return update - 1 if update is not None and update <= self.blocks else None

    def noise(self, draw: torch.Generator) -> Tensor:
        """Unit Gaussian noise [1, 16, F, h, w] for all frames of the window."""
        channels, _, height, width = self.stream.latent_shape
        return torch.randn(1, channels, self.frames, height, width, generator=draw).to(self.device)

    def blocks_of(self, latents: Tensor) -> list[Tensor]:
        """[1, 16, F, h, w] of the window, block by block."""
        return list(latents.split(self.stream.frames_per_block, dim=2))

    def open(self, dit: CausalDiT, clip: EncodedClip, late: Tensor | None = None) -> Scene:
        """The scene of a clip of this many blocks; `late` [1, 16, 1, h, w] replaces the reference in the late sink."""
        text = dit.text_kv(clip.text)
        audio = [dit.casual_audio_encoder(states) for states in clip.states]
        local, global_tokens = (torch.cat(tokens) for tokens in zip(*audio, strict=True))
        sink = self._prefill(dit, clip.reference, clip.motion, text)
        late_sink = [] if late is None else self._prefill(dit, late, clip.motion, text)
        return Scene(text, sink, late_sink, local, global_tokens)

    def replaced(self, dit: CausalDiT, scene: Scene, clip: EncodedClip, late: Tensor) -> Scene:
        """The scene with the late sink of this latent."""
        return scene._replace(late_sink=self._prefill(dit, late, clip.motion, scene.text))

    def block(
        self,
        dit: CausalDiT,
        scene: Scene,
        place: Place,
        index: int,
        latent: Tensor,
        level: float,
        past: Sequence[KV],
    ) -> tuple[Tensor, KV]:
        """Velocity [1, 16, F, h, w] of the window's block `index`, and its rotated keys and values.

        past: keys and values of the blocks before it in the window, each at its own level; the stream's window limits
        how many are used.
        """
        size = self.stream.frames_per_block
        first = (place.first_block + index) * size
        conditions = Conditions(
            scene.text,
            self._sink(scene, index),
            self._history(scene, past),
            scene.audio(index * size, (index + 1) * size),
        )
        return dit.denoise(
            latent,
            conditions,
            dit.modulation(timestep(level)),
            self._on_device(self._phases.block(first, size)),
            self._sink_turn(first, place.distance),
        )

    def whole(self, dit: CausalDiT, scene: Scene, place: Place, latents: Tensor, level: float) -> Tensor:
        """Velocity [1, 16, F, h, w] of all frames of the window together, at one level: the bidirectional teacher."""
        first = place.first_block * self.stream.frames_per_block
        conditions = Conditions(scene.text, scene.sink, self._history(scene, []), scene.audio(0, self.frames))
        velocity, _ = dit.denoise(
            latents,
            conditions,
            dit.modulation(timestep(level)),
            self._on_device(self._phases.block(first, self.frames)),
            self._sink_turn(first, place.distance),
        )
        return velocity

    def _prefill(self, dit: CausalDiT, reference: Tensor, motion: Tensor, text: KV) -> KV:
        phase = self._on_device(self._phases.sink())
        return dit.prefill(reference, motion, text, dit.modulation(0.0), phase)

    def _sink(self, scene: Scene, index: int) -> KV:
        late = self.late_index is not None and index >= self.late_index and scene.late_sink
        return scene.late_sink if late else scene.sink

    def _history(self, scene: Scene, past: Sequence[KV]) -> KV:
        """Keys and values of the last blocks in every layer; without tokens if there are none."""
        seen = past[-self.stream.past_blocks :]
        if not seen:
            return [(key[:, :, :0], value[:, :, :0]) for key, value in scene.sink]
        layers = zip(*seen, strict=True)
        return [(torch.cat([k for k, _ in layer], dim=2), torch.cat([v for _, v in layer], dim=2)) for layer in layers]

    def _sink_turn(self, first_frame: int, distance: int) -> Tensor:
        position = rope.sink_position(first_frame, distance) if self._rolls else rope.REFERENCE_POSITION
        return self._on_device(self._phases.sink_turn(position))

    def _on_device(self, phase: Array) -> Tensor:
        return torch.from_numpy(phase).to(self.device)
