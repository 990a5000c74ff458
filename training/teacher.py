"""Stage 0d: the bidirectional teacher, trained by flow matching on whole clips (section 3.2).

All latent frames of a clip have one noise level and attend to one another. The sink keeps its distance from the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from live_avatar.model.dit import CausalDiT
from training import distributed
from training.config import TrainingConfig
from training.data.clips import Split
from training.flow import chance, choice, mixed, training_levels, velocity_loss
from training.init import fresh
from training.loop import generator
from training.matching import FlowMatching, Sample, movement
from training.shards import open_clips
from training.window import Place, Scene, Window, draw_place, unspoken

NAME = "teacher"


@dataclass(frozen=True)
class TeacherLoss:
    """The loss of one window of a clip."""

    window: Window
    weight: Tensor
    far_share: float
    dropout: float

    def __call__(self, dit: CausalDiT, sample: Sample, draw: torch.Generator, spoken: bool) -> Tensor:
        window, clip = self.window, sample.clip
        place = draw_place(sample.start, self.far_share, window.stream, draw)
        level = choice(training_levels(window.stream), draw)
        noise = window.noise(draw)
        silent = chance(self.dropout, draw) or not spoken
        scene = window.open(dit, unspoken(clip) if silent else clip)
        return score_loss(dit, window, scene, place, clip.latents, noise, level, self.weight)


def score_loss(
    dit: CausalDiT,
    window: Window,
    scene: Scene,
    place: Place,
    clean: Tensor,
    noise: Tensor,
    level: float,
    weight: Tensor,
) -> Tensor:
    """Flow matching of whole windows, for the teacher on clips and the fake score on generated windows."""
    velocity = window.whole(dit, scene, place, mixed(clean, noise, level), level)
    return velocity_loss(velocity, clean, noise, weight)


def make_stage(config: TrainingConfig, out: Path) -> FlowMatching:
    """The stage on the data set of the run in `out`. Raises `TrainingError` if that is missing."""
    settings = config.teacher
    clips, validation = (open_clips(config, out, split) for split in (Split.TRAIN, Split.VALIDATION))
    window = Window(config.system, settings.blocks, distributed.device())
    loss = TeacherLoss(window, movement(clips, settings.motion_weight), settings.far_share, settings.audio_dropout)
    dit = fresh(config.system.dit, generator(config.seed, NAME, "weights"))
    return FlowMatching(NAME, config.seed, settings, dit, loss, clips, validation)
