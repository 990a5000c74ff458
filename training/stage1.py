"""Stage 1: diffusion forcing, which makes the teacher causal (section 3.2).

Every block has its own noise level. The blocks run in order, each with the keys and values of the blocks before it at
their levels. This gives full attention inside a block, a causal mask between blocks, a window of L blocks and the sink;
gradients flow through the keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from live_avatar.config import StreamConfig
from live_avatar.model.dit import KV, CausalDiT
from live_avatar.model.schedule import make_schedule
from training import distributed
from training.config import TrainingConfig
from training.data.clips import Split
from training.flow import chance, choice, mixed, training_levels, velocity_loss
from training.init import load
from training.matching import FlowMatching, Sample, movement
from training.shards import open_clips
from training.teacher import NAME as TEACHER
from training.window import Place, Scene, Window, draw_place, unspoken

NAME = "stage1"
EVEN_SHARE = 0.5
"""Share of windows whose blocks all have one level, like a stream's steps, whose history has their own level. The other
windows are diffusion forcing proper."""
SCHEDULE_SHARE = 0.5
"""Share of windows whose levels are those of the released schedule, the only levels in stage 2."""
REPLACED_SHARE = 0.5
"""Share of windows whose own first latent frame replaces the sink, as in a stream (AAS)."""


def draw_levels(stream: StreamConfig, blocks: int, draw: torch.Generator) -> list[float]:
    """A noise level for every block of a window."""
    scheduled = chance(SCHEDULE_SHARE, draw)
    levels = make_schedule(stream).sigmas[:-1] if scheduled else training_levels(stream)
    if chance(EVEN_SHARE, draw):
        return [choice(levels, draw)] * blocks
    return [choice(levels, draw) for _ in range(blocks)]


@dataclass(frozen=True)
class ForcingLoss:
    """The loss of one window of a clip."""

    window: Window
    weight: Tensor
    far_share: float

    def __call__(self, dit: CausalDiT, sample: Sample, draw: torch.Generator, spoken: bool) -> Tensor:
        window, clip = self.window, sample.clip
        place = draw_place(sample.start, self.far_share, window.stream, draw)
        levels = draw_levels(window.stream, window.blocks, draw)
        late = clip.latents[:, :, :1] if chance(REPLACED_SHARE, draw) else None
        noise = window.noise(draw)
        blocks = zip(window.blocks_of(clip.latents), window.blocks_of(noise), levels, strict=True)
        noisy = [mixed(clean, one, level) for clean, one, level in blocks]
        scene = window.open(dit, clip if spoken else unspoken(clip), late)
        velocity = forced_velocity(dit, window, scene, place, noisy, levels)
        return velocity_loss(velocity, clip.latents, noise, self.weight)


def forced_velocity(
    dit: CausalDiT, window: Window, scene: Scene, place: Place, noisy: Sequence[Tensor], levels: Sequence[float]
) -> Tensor:
    """Velocity [1, 16, F, h, w] of all blocks of a window, each at its own level."""
    past: list[KV] = []
    velocities = []
    for index, (latent, level) in enumerate(zip(noisy, levels, strict=True)):
        velocity, written = window.block(dit, scene, place, index, latent, level, past)
        velocities.append(velocity)
        past.append(written)
    return torch.cat(velocities, dim=2)


def make_stage(config: TrainingConfig, out: Path) -> FlowMatching:
    """The stage on the data set and the teacher of the run in `out`. Raises `TrainingError` if one is missing."""
    settings = config.stage1
    clips, validation = (open_clips(config, out, split) for split in (Split.TRAIN, Split.VALIDATION))
    window = Window(config.system, settings.blocks, distributed.device())
    loss = ForcingLoss(window, movement(clips, settings.motion_weight), settings.far_share)
    return FlowMatching(NAME, config.seed, settings, load(config.system.dit, out, TEACHER), loss, clips, validation)
