"""The teacher's stage: it learns, its steps are those of their numbers, and where its loss looks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from live_avatar.errors import ConfigError
from live_avatar.model.dit import CausalDiT
from tests.tolerances import FLOAT32
from tests.training.conftest import SMALL, drawn_clip, drawn_network
from training import distributed
from training.config import TeacherStage
from training.encoded import EncodedClip
from training.errors import TrainingError
from training.init import fresh, load
from training.matching import FlowMatching, Sample, draw_sample, movement
from training.roles import whole
from training.teacher import TeacherLoss
from training.window import Place, Window

SETTINGS = TeacherStage(steps=40, batch=2, learning_rate=3e-3, blocks=2, far_share=0.5)


def fresh_network() -> CausalDiT:
    return fresh(SMALL.dit, torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def clips() -> list[EncodedClip]:
    """Two clips of which one latent pixel moves, and speech tells where to."""
    made = []
    for seed in range(2):
        clip = drawn_clip(3, seed)
        latents = clip.reference.expand(-1, -1, 9, -1, -1).clone()
        latents[:, :, :, 5, 3] += clip.states[:, 0, 0, ::4].reshape(1, 1, 9)
        made.append(replace(clip, latents=latents))
    return made


def stage_of(clips: list[EncodedClip], settings: TeacherStage = SETTINGS) -> FlowMatching:
    window = Window(SMALL, settings.blocks)
    loss = TeacherLoss(window, movement(clips, settings.motion_weight), settings.far_share, settings.audio_dropout)
    return FlowMatching("teacher", 0, settings, whole(fresh_network()), loss, clips, clips)


def weights(stage: FlowMatching) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in stage.modules["dit"].state_dict().items()}


@pytest.mark.slow
def test_the_teacher_learns(clips: list[EncodedClip]) -> None:
    stage = stage_of(clips)
    before = stage.validate()
    for number in range(1, SETTINGS.steps + 1):
        stage.step(number)
    after = stage.validate()
    assert after["loss"] < 0.75 * before["loss"]
    assert before["speech_gain"] == 0  # nothing is heard until the injectors have learnt to speak


def test_a_step_is_that_of_its_number(clips: list[EncodedClip]) -> None:
    """Whatever steps came before: a resumed run goes on as the uninterrupted one."""
    stages = [stage_of(clips) for _ in range(3)]
    figures = [stage.step(number) for stage, number in zip(stages, (1, 1, 2), strict=True)]
    assert figures[0] == figures[1] != figures[2]
    first, second, other = (weights(stage) for stage in stages)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert not any(parameter.grad is not None for parameter in stages[0].modules["dit"].parameters())


def test_a_batch_is_the_mean_of_its_clips(clips: list[EncodedClip]) -> None:
    """Its clips one after another, with the draws of their numbers."""
    stage, loss = stage_of(clips), TeacherLoss(Window(SMALL, 2), movement(clips, 0.5), 0.5, 0.1)
    dit, total = fresh_network(), 0.0
    for place in range(SETTINGS.batch):
        from training.loop import generator

        draw = generator(0, "teacher", 7, place)
        clip = clips[int(torch.randint(2, (), generator=draw))]
        total += loss(dit, draw_sample(clip, 2, draw), draw, spoken=True).item() / 2
    assert stage.step(7)["loss"] == pytest.approx(total, rel=FLOAT32)


def test_validation_changes_nothing_and_repeats(clips: list[EncodedClip]) -> None:
    stage = stage_of(clips)
    before = weights(stage)
    assert stage.validate() == stage.validate()
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(stage).items())


def test_dropped_speech_is_no_speech(clips: list[EncodedClip]) -> None:
    dit, window = drawn_network().requires_grad_(False), Window(SMALL, 2)
    sample = replace(draw_sample(clips[0], 2, torch.Generator().manual_seed(0)), start=0)

    def value(dropout: float, spoken: bool) -> float:
        loss = TeacherLoss(window, movement(clips, 0.5), 0.0, dropout)
        return loss(dit, sample, torch.Generator().manual_seed(6), spoken).item()

    assert value(1.0, True) == value(1.0, False) == value(0.0, False) != value(0.0, True)


def test_the_loss_looks_where_clips_move(clips: list[EncodedClip]) -> None:
    half = movement(clips, 0.5)
    assert half.shape == (1, 1, 1, 8, 8)
    assert half.mean().item() == pytest.approx(1, abs=FLOAT32)
    assert half[..., 5, 3].item() == pytest.approx(0.5 + 0.5 * 64, rel=1e-3)
    assert half[..., 0, 0].item() == pytest.approx(0.5, abs=1e-3)
    assert torch.equal(movement(clips, 0.0), torch.ones(1, 1, 1, 1, 1))


def test_a_sample_is_any_window_of_its_clip(clips: list[EncodedClip], draw: torch.Generator) -> None:
    samples = [draw_sample(clips[0], 2, draw) for _ in range(30)]
    assert {sample.start for sample in samples} == {0, 1}
    for sample in samples:
        assert torch.equal(sample.clip.latents, clips[0].latents[:, :, 3 * sample.start : 3 * sample.start + 6])


def test_a_fresh_network_predicts_no_velocity_and_hears_nothing() -> None:
    dit = fresh_network()
    window, clip = Window(SMALL, 2), drawn_clip(2)
    loss = TeacherLoss(window, torch.ones(1), 0.0, 0.0)
    noise = window.noise(torch.Generator().manual_seed(0))
    assert loss(
        dit, Sample(clip, 0, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(0), spoken=True
    ).requires_grad
    velocity = window.whole(dit, window.open(dit, clip), Place(0, 30), noise, 1.0)
    assert not velocity.any()
    spread = dit.blocks[0].self_attn.q.weight.std().item()
    assert spread == pytest.approx((2 / (32 + 32)) ** 0.5, rel=0.05)
    assert dit.blocks[0].modulation.std().item() == pytest.approx(32**-0.5, rel=0.2)
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in dit.parameters())


def test_a_missing_network_names_the_stage_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"teacher/dit.safetensors does not exist; train it with --stage teacher"):
        load(SMALL.dit, tmp_path, "teacher")


def test_a_batch_that_cannot_be_split_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world", lambda: 2)
    with pytest.raises(ConfigError, match="a batch of 3 clips cannot be split evenly among 2 processes; make batch"):
        distributed.share(3)
    assert list(distributed.share(4)) == [0, 2]
