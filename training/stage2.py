"""Stage 2: self-forcing distribution matching distillation (section 3.2, Algorithms 1 and 2).

The generator starts with stage 1's network, both scores with the teacher. A step is `fake_steps` updates of the fake
score, each on newly generated windows, and one update of the generator on the last of these windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from live_avatar.config import Preset
from live_avatar.model.dit import CausalDiT
from training import distributed
from training.accumulation import backward_by_blocks
from training.config import DistillationStage, TrainingConfig
from training.data.clips import Split
from training.dmd import Scores, draw_score_level, matching_loss
from training.encoded import EncodedClip
from training.flow import chance
from training.init import load
from training.logs import mean
from training.loop import generator
from training.lora import adapt
from training.matching import Clips, adam, draw_index, draw_sample, movement, update
from training.rollout import Roller, Rollout, RolloutInput, Rules
from training.shards import open_clips
from training.stage1 import NAME as STAGE1
from training.stage1 import REPLACED_SHARE
from training.teacher import NAME as TEACHER
from training.teacher import score_loss
from training.window import Window, draw_place, unspoken

NAME = "stage2"
Key = tuple[int, str, int, int, int]
"""Seed, stage, step, update of the fake score, and number in the batch; a window's random draws depend on these."""


@dataclass(frozen=True)
class Made:
    """A generated window with its inputs; `draw` gives the following random draws."""

    key: Key
    given: RolloutInput
    rollout: Rollout
    draw: torch.Generator


class Distillation:
    """The stage; its result is `modules["dit"]`, the generator."""

    def __init__(
        self,
        seed: int,
        settings: DistillationStage,
        roller: Roller,
        networks: tuple[CausalDiT, CausalDiT, CausalDiT],
        clips: Clips,
        validation: Clips,
    ) -> None:
        """`networks`: the generator, trained as a whole or by adapters, the real score and the fake score."""
        dit, real, fake = networks
        self._key = (seed, NAME)
        self._settings = settings
        self._roller = roller
        self._clips = clips
        self._validation = validation
        self._weight = movement(clips, settings.motion_weight)
        self._unit, fake_unit = distributed.shard(dit), distributed.shard(fake)
        real_unit = distributed.shard(real.requires_grad_(False))
        self._scores = Scores(roller.window, real_unit, fake_unit, settings.guidance)
        scale = settings.fake_learning_rate / settings.learning_rate
        trained = [parameter for parameter in dit.parameters() if parameter.requires_grad]
        self.modules: dict[str, nn.Module] = {"dit": dit, "fake": fake}
        self.optimizers: dict[str, Optimizer] = {
            "dit": adam(trained, settings),
            "fake": adam(list(fake.parameters()), settings, scale),
        }

    def step(self, number: int) -> dict[str, float]:
        """Iteration `number`, from 1."""
        mine = distributed.share(self._settings.batch)
        figures = []
        for turn in range(self._settings.fake_steps):
            windows = [self._generate((*self._key, number, turn, place)) for place in mine]
            fake_loss, fake_norm = self._update_fake(windows)
            figures.append({"fake_loss": distributed.mean(fake_loss), "fake_gradient": fake_norm})
        loss = sum(self._descend(made, len(mine)) for made in windows)
        norm = update(self.optimizers["dit"], self._settings.clip_norm)
        return {"loss": distributed.mean(loss), "gradient": norm, **mean(figures)}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Distance of validation clips, generated with all steps, from the truth, and its rise without speech.

        The best distance is not 0, because the speech does not determine all movements of the truth.
        """
        heard, unheard = (self._distance(spoken) for spoken in (True, False))
        return {"loss": heard, "speech_gain": unheard - heard}

    def outputs(self) -> dict[str, nn.Module]:
        """The generator."""
        return {"dit": self.modules["dit"]}

    def _generate(self, key: Key, gradient: bool = False) -> Made:
        """A window for the draws of `key`; with `gradient`, its latents have the graph of the exit step."""
        draw = generator(*key)
        _, _, number, turn, place = key
        position = ((number - 1) * self._settings.fake_steps + turn) * self._settings.batch + place
        clip = self._clips[draw_index(self._clips, draw, position)]
        given = self._given(clip, draw, self._settings.far_share)
        rollout = self._unit(lambda dit: self._roller.roll_out(dit, given, draw, gradient))
        return Made(key, given, rollout, draw)

    def _given(self, clip: EncodedClip, draw: torch.Generator, far_share: float) -> RolloutInput:
        window = self._roller.window
        sample = draw_sample(clip, window.blocks, draw)
        place = draw_place(sample.start, far_share, window.stream, draw)
        exit_step = int(torch.randint(self._roller.steps, (), generator=draw))
        replaces = chance(REPLACED_SHARE, draw)
        return RolloutInput(sample.clip, place, window.noise(draw), exit_step, replaces)

    def _update_fake(self, windows: Sequence[Made]) -> tuple[float, float]:
        """Updates the fake score on generated windows; returns its loss and the norm of its gradient."""
        total = 0.0
        for made in windows:
            loss = self._fake_loss(made) / len(windows)
            loss.backward()
            total += loss.item()
        return total, update(self.optimizers["fake"], self._settings.clip_norm)

    def _fake_loss(self, made: Made) -> Tensor:
        window, given, clean = self._roller.window, made.given, made.rollout.latents
        level, noise = draw_score_level(window.stream, made.draw), window.noise(made.draw)
        return self._scores.fake(
            lambda dit: score_loss(
                dit, window, window.open(dit, given.clip), given.place, clean, noise, level, self._weight
            )
        )

    def _descend(self, made: Made, count: int) -> float:
        """Adds the gradients of one of `count` windows to the generator's; returns its loss."""
        window, given, clean = self._roller.window, made.given, made.rollout.latents
        level, noise = draw_score_level(window.stream, made.draw), window.noise(made.draw)
        gradient = self._scores.gradient(given.clip, given.place, clean, noise, level)
        if self._settings.accumulate:
            part = gradient / (gradient.numel() * count)
            backward_by_blocks(self._roller, self._unit, given, made.rollout, part)
        else:
            kept = self._generate(made.key, gradient=True).rollout
            (matching_loss(kept.latents, gradient) / count).backward()
        return matching_loss(clean, gradient).item() / count

    def _distance(self, spoken: bool) -> float:
        distances: list[float] = []
        for index in range(len(self._validation)):
            draw = generator(*self._key, "validation", index)
            given = self._given(self._validation[index], draw, far_share=0.0)
            truth, clip = given.clip.latents, given.clip if spoken else unspoken(given.clip)
            whole = replace(given, clip=clip, exit_step=self._roller.steps - 1)
            made = self._unit(partial(self._roller.roll_out, given=whole, draw=draw))
            distances.append((self._weight * (made.latents - truth).square()).mean().item())
        return sum(distances) / len(distances)


def make_stage(config: TrainingConfig, out: Path) -> Distillation:
    """The stage on the data set and the networks of the run in `out`. Raises `TrainingError` if one is missing."""
    settings, system = config.stage2, config.system
    clips, validation = (open_clips(config, out, split) for split in (Split.TRAIN, Split.VALIDATION))
    dit, real, fake = (load(system.dit, out, stage) for stage in (STAGE1, TEACHER, TEACHER))
    if settings.lora is not None:
        adapt(dit, settings.lora, generator(config.seed, NAME, "adapters"))
    return Distillation(config.seed, settings, make_roller(system, settings), (dit, real, fake), clips, validation)


def make_roller(system: Preset, settings: DistillationStage) -> Roller:
    """The rollouts with the settings of the stage."""
    preset = system if settings.replaces_sink else system.with_stream(sink_update_block=None)
    window = Window(preset, settings.blocks, distributed.device(), settings.rolls)
    return Roller(window, Rules(settings.clean_history, settings.history_noise))
