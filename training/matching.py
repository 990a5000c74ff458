"""Shared base of the teacher and stage 1: a stage that minimises a flow-matching loss of single clips.

The clips of a batch are processed one after another, and their gradients are added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from live_avatar.model.dit import CausalDiT
from training import distributed
from training.config import DiTStage, StageConfig
from training.encoded import EncodedClip
from training.loop import clip_gradients, generator
from training.roles import Role
from training.shards import ShardedClips
from training.window import Window, moved_to, part

BETAS = (0.9, 0.99)
"""Betas of Adam. Runs of some thousand steps need a shorter memory of squares than the usual 0.999."""
MAP_CLIPS = 64  # clips for the map of movement


class Clips(Protocol):
    """Encoded clips by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> EncodedClip: ...


@dataclass(frozen=True)
class Sample:
    """A window of a clip on this process's device, and its number of blocks from the clip's start.

    passes: gives the draws on which the number of passes depends.
    """

    clip: EncodedClip
    start: int
    passes: torch.Generator


class ClipLoss(Protocol):
    """The loss of one sample, a scalar with a graph. Its draws come from `draw`; `spoken` False drops the speech."""

    @property
    def window(self) -> Window: ...

    def __call__(self, dit: CausalDiT, sample: Sample, draw: torch.Generator, spoken: bool) -> Tensor: ...


def draw_index(clips: Clips, draw: torch.Generator, position: int) -> int:
    """The number of a clip: a random one, or of shards the one at this position of their shuffle."""
    drawn = int(torch.randint(len(clips), (), generator=draw))
    return clips.at(position) if isinstance(clips, ShardedClips) else drawn


def draw_sample(clip: EncodedClip, blocks: int, draw: torch.Generator, passes: torch.Generator | None = None) -> Sample:
    """A random window of `blocks` blocks of the clip; `passes` is `draw` if it is not given."""
    start = int(torch.randint(len(clip.states) - blocks + 1, (), generator=draw))
    return Sample(moved_to(part(clip, start, blocks), distributed.device()), start, passes or draw)


def draw_of_passes(role: Role, key: tuple[str | int, ...], draw: torch.Generator) -> torch.Generator:
    """The draws on which the number of passes depends.

    They are `draw`, or the same for all clips of a step if all processes must make the same passes. The last entry of
    `key` is the clip's number in the batch.
    """
    return generator(*cast(tuple[int, *tuple[str | int, ...]], key[:-1]), "passes") if role.together else draw


def movement(clips: Clips, share: float) -> Tensor:
    """Weights [1, 1, 1, h, w] of mean 1 for a loss over latents; `share` of them is for regions that move.

    A mouth covers about 4 of a small picture's 144 latent pixels, so a plain mean hardly counts it. The map is the
    same for all clips, so it does not change the optimum, only the order of learning. A share of 0 needs no map, and
    gives [1, 1, 1, 1, 1].
    """
    if not share:
        return torch.ones(1, 1, 1, 1, 1, device=distributed.device())
    some = [clips[index].latents for index in range(min(MAP_CLIPS, len(clips)))]
    spread = torch.stack([latents.var(dim=2).mean(dim=1) for latents in some]).mean(dim=0)
    return (1 - share + share * spread / spread.mean())[:, None, None].to(distributed.device())


def adam(parameters: Sequence[nn.Parameter], settings: StageConfig, scale: float = 1.0) -> AdamW:
    """The optimiser of all stages; its learning rate is the stage's times `scale`."""
    groups = [{"params": list(parameters), "scale": scale}]
    return AdamW(groups, lr=settings.learning_rate, betas=BETAS, weight_decay=settings.weight_decay)


def update(optimizer: Optimizer, clip_norm: float) -> float:
    """Clips the accumulated gradients, updates the parameters, clears the gradients; returns their norm before."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = clip_gradients(parameters, clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    return norm


class FlowMatching:
    """A stage that trains one network on single clips."""

    def __init__(
        self, name: str, seed: int, settings: DiTStage, dit: Role, loss: ClipLoss, clips: Clips, validation: Clips
    ) -> None:
        self._key = (seed, name)
        self._settings = settings
        self._loss = loss
        self._clips = clips
        self._validation = validation
        self._dit = dit
        self.modules: dict[str, nn.Module] = {"dit": dit.module}
        self.optimizers: dict[str, Optimizer] = {"dit": adam(dit.parameters, settings)}

    def step(self, number: int) -> dict[str, float]:
        """Iteration `number`, from 1."""
        mine = distributed.share(self._settings.batch)
        total = 0.0
        for place in mine:
            key = (*self._key, number, place)
            draw = generator(*key)
            position = (number - 1) * self._settings.batch + place
            clip = self._clips[draw_index(self._clips, draw, position)]
            loss = self._run(clip, draw, draw_of_passes(self._dit, key, draw), spoken=True) / len(mine)
            loss.backward()
            total += loss.item()
        norm = update(self.optimizers["dit"], self._settings.clip_norm)
        return {"loss": distributed.mean(total), "gradient": norm}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The loss on the validation clips, and its rise without their speech."""
        heard, unheard = (self._validation_loss(spoken) for spoken in (True, False))
        return {"loss": heard, "speech_gain": unheard - heard}

    def outputs(self) -> dict[str, nn.Module]:
        """The network."""
        return self.modules

    def _validation_loss(self, spoken: bool) -> float:
        count = len(self._validation)
        losses = []
        for index in range(count):
            draw = generator(*self._key, "validation", index)
            losses.append(self._run(self._validation[index], draw, draw, spoken))
        return torch.stack(losses).mean().item()

    def _run(self, clip: EncodedClip, draw: torch.Generator, passes: torch.Generator, spoken: bool) -> Tensor:
        sample = draw_sample(clip, self._loss.window.blocks, draw, passes)
        return self._dit(partial(self._loss, sample=sample, draw=draw, spoken=spoken))
