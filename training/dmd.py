"""Distribution matching: the difference of two scores for a generated window, and the generator's loss from it.

The real score is the frozen teacher; the fake score follows the generator's own distribution. Both see the whole window
(section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from live_avatar.config import StreamConfig
from live_avatar.model.dit import CausalDiT
from training.encoded import EncodedClip
from training.flow import choice, mixed, moved, training_levels
from training.roles import Role
from training.window import Place, Window, unspoken

EXTREME = 0.02
"""Levels closer than this to 0 or 1 are not used: near 1 a score sees only noise, near 0 only the window itself."""


def draw_score_level(stream: StreamConfig, draw: torch.Generator) -> float:
    """The noise level for a comparison of the scores, or for a step of the fake one."""
    return choice([level for level in training_levels(stream) if EXTREME <= level <= 1 - EXTREME], draw)


@dataclass(frozen=True)
class Scores:
    """Both scores; `guidance` is the scale of the real score's guidance by speech, 1 for none."""

    window: Window
    real: Role
    fake: Role
    guidance: float = 1.0

    @torch.no_grad()
    def gradient(self, clip: EncodedClip, place: Place, clean: Tensor, noise: Tensor, level: float) -> Tensor:
        """The gradient for the generator's latents, [1, 16, F, h, w], of mean size about 1.

        It is x0_fake - x0_real over the mean distance of the latents from x0_real, so all levels have the same weight
        (DMD2's normalisation, also used by self-forcing).
        """
        noisy = mixed(clean, noise, level)

        def predicted(score: Role, of: EncodedClip) -> Tensor:
            velocity = score(lambda dit: _whole(dit, self.window, of, place, noisy, level))
            return moved(noisy, velocity, level, 0.0)

        real = predicted(self.real, clip)
        if self.guidance != 1:
            unheard = predicted(self.real, unspoken(clip))
            real = unheard + self.guidance * (real - unheard)
        return (predicted(self.fake, clip) - real) / (clean - real).abs().mean()


def _whole(dit: CausalDiT, window: Window, clip: EncodedClip, place: Place, noisy: Tensor, level: float) -> Tensor:
    return window.whole(dit, window.open(dit, clip), place, noisy, level)


def matching_loss(clean: Tensor, gradient: Tensor) -> Tensor:
    """A scalar whose gradient with respect to `clean` is the given one over the number of latents."""
    target = (clean - gradient).detach()
    return 0.5 * (clean - target).square().mean()
