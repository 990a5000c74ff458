"""The gradient of distribution matching, from real networks as scores."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.tolerances import FLOAT32
from tests.training.conftest import SMALL, drawn_clip, drawn_network
from training.distributed import Unit
from training.dmd import EXTREME, Scores, draw_score_level, matching_loss
from training.encoded import EncodedClip
from training.flow import mixed, moved
from training.window import Place, Window, unspoken

BLOCKS = 2
PLACE = Place(3, 12)
LEVEL = 0.4
WINDOW = Window(SMALL, BLOCKS)


@pytest.fixture(scope="module")
def clip() -> EncodedClip:
    return drawn_clip(BLOCKS)


@pytest.fixture(scope="module")
def noise() -> Tensor:
    return WINDOW.noise(torch.Generator().manual_seed(2))


def scores(real: int, fake: int, guidance: float = 1.0) -> Scores:
    """Networks by their seeds."""
    return Scores(WINDOW, Unit(drawn_network(seed=real)), Unit(drawn_network(seed=fake)), guidance)


def predicted(seed: int, clip: EncodedClip, clean: Tensor, noise: Tensor) -> Tensor:
    dit = drawn_network(seed=seed).requires_grad_(False)
    noisy = mixed(clean, noise, LEVEL)
    return moved(noisy, WINDOW.whole(dit, WINDOW.open(dit, clip), PLACE, noisy, LEVEL), LEVEL, 0.0)


def test_the_gradient_leads_from_the_fake_scores_prediction_to_the_real_ones(clip: EncodedClip, noise: Tensor) -> None:
    clean = clip.latents
    real, fake = predicted(1, clip, clean, noise), predicted(2, clip, clean, noise)
    gradient = scores(1, 2).gradient(clip, PLACE, clean, noise, LEVEL)
    expected = (fake - real) / (clean - real).abs().mean()
    assert (gradient - expected).abs().max() <= FLOAT32 * expected.abs().max()
    assert not gradient.requires_grad


def test_scores_that_agree_leave_the_generator_alone(clip: EncodedClip, noise: Tensor) -> None:
    assert not scores(1, 1).gradient(clip, PLACE, clip.latents, noise, LEVEL).any()


def test_guidance_goes_on_from_no_speech_through_speech(clip: EncodedClip, noise: Tensor) -> None:
    clean = clip.latents
    real, unheard = predicted(1, clip, clean, noise), predicted(1, unspoken(clip), clean, noise)
    guided = unheard + 2.5 * (real - unheard)
    expected = (predicted(2, clip, clean, noise) - guided) / (clean - guided).abs().mean()
    gradient = scores(1, 2, guidance=2.5).gradient(clip, PLACE, clean, noise, LEVEL)
    assert (gradient - expected).abs().max() <= FLOAT32 * expected.abs().max()
    quiet = unspoken(clip)
    assert not scores(1, 1, guidance=2.5).gradient(quiet, PLACE, clean, noise, LEVEL).any()


def test_the_losss_gradient_is_the_given_one(clip: EncodedClip, noise: Tensor) -> None:
    clean = clip.latents.clone().requires_grad_()
    loss = matching_loss(clean, noise)
    loss.backward()
    assert clean.grad is not None
    assert (clean.grad - noise / noise.numel()).abs().max() <= FLOAT32 / noise.numel()
    assert loss.item() == pytest.approx(0.5 * noise.square().mean().item(), rel=1e-5)


def test_levels_of_scores_are_not_extreme(draw: torch.Generator) -> None:
    levels = [draw_score_level(SMALL.stream, draw) for _ in range(500)]
    assert EXTREME <= min(levels) < 0.2
    assert 0.9 < max(levels) <= 1 - EXTREME
