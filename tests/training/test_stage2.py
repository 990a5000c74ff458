"""The distillation stage: the block-wise gradient is the plain loop's, and who moves when."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from live_avatar.model.dit import CausalDiT
from tests.training.conftest import SMALL, differing, drawn_clip, drawn_network, gradients, three
from training.accumulation import backward_by_blocks
from training.config import DistillationStage, LoRAConfig
from training.encoded import EncodedClip
from training.lora import adapt, draw_factors
from training.roles import whole
from training.rollout import Roller, RolloutInput, Rules
from training.stage2 import Distillation, make_roller
from training.window import Place, Window

BLOCKS = 6
SETTINGS = DistillationStage(
    steps=5, batch=2, learning_rate=1e-3, fake_learning_rate=2e-3, fake_steps=2, blocks=BLOCKS, far_share=0.5
)


@pytest.fixture(scope="module")
def clips() -> list[EncodedClip]:
    return [drawn_clip(BLOCKS + 1, seed) for seed in range(3)]


def adapted() -> CausalDiT:
    dit = drawn_network()
    adapt(dit, LoRAConfig(rank=4, alpha=2.0))
    draw_factors(dit, torch.Generator().manual_seed(3))
    with torch.no_grad():
        for name, parameter in dit.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(4))
    return dit


@pytest.mark.parametrize("exit_step", range(SMALL.stream.steps))
@pytest.mark.parametrize("make", [drawn_network, adapted])
def test_block_wise_accumulation_gives_the_plain_loops_gradient(exit_step: int, make: Any) -> None:
    check_gradients(make(), exit_step, Rules())


@pytest.mark.parametrize("rules", [Rules(clean_history=True), Rules(history_noise=0.4)])
def test_so_it_does_under_other_rules(rules: Rules) -> None:
    check_gradients(drawn_network(), 1, rules)


def check_gradients(dit: CausalDiT, exit_step: int, rules: Rules) -> None:
    window = Window(SMALL, BLOCKS)
    roller, clip = Roller(window, rules), drawn_clip(BLOCKS)
    given = RolloutInput(clip, Place(40, 9), window.noise(torch.Generator().manual_seed(1)), exit_step, replaces=True)
    slope = torch.randn(given.noise.shape, generator=torch.Generator().manual_seed(2))
    roller.roll_out(dit, given, torch.Generator().manual_seed(3), gradient=True).latents.backward(slope)
    plain = gradients(dit)
    dit.zero_grad()
    made = roller.roll_out(dit, given, torch.Generator().manual_seed(3))
    backward_by_blocks(roller, whole(dit), given, made, slope)
    assert plain
    assert differing(gradients(dit), plain) == []


def stage_of(clips: list[EncodedClip], **changes: Any) -> Distillation:
    settings = replace(SETTINGS, **changes)
    networks = three()
    return Distillation(0, settings, make_roller(SMALL, settings), networks, clips, clips[:1])


def weights(stage: Distillation, name: str) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in stage.modules[name].state_dict().items()}


def test_a_step_with_accumulation_is_the_plain_step(clips: list[EncodedClip]) -> None:
    """Gradients as above; Adam's first step hides their size, so the norms that the step reports are compared."""
    one, other = stage_of(clips), stage_of(clips, accumulate=False)
    ours, plain = one.step(3), other.step(3)
    assert ours == pytest.approx(plain, rel=1e-5)
    assert ours["gradient"] > 0


def test_a_step_is_that_of_its_number(clips: list[EncodedClip]) -> None:
    stages = [stage_of(clips, batch=1, fake_steps=1, blocks=2) for _ in range(3)]
    figures = [stage.step(number) for stage, number in zip(stages, (1, 1, 2), strict=True)]
    assert figures[0] == figures[1] != figures[2]
    for name in ("dit", "fake"):
        first, second, other = (weights(stage, name) for stage in stages)
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert not all(torch.equal(first[key], other[key]) for key in first)


def test_the_fake_score_moves_several_times_and_the_teacher_never(clips: list[EncodedClip]) -> None:
    networks = three()
    real = {name: tensor.clone() for name, tensor in networks[1].module.state_dict().items()}
    stage = Distillation(0, SETTINGS, make_roller(SMALL, SETTINGS), networks, clips, clips[:1])
    stage.step(1)
    counts = {
        name: {int(state["step"]) for state in optimizer.state.values()} for name, optimizer in stage.optimizers.items()
    }
    assert counts == {"dit": {1}, "fake": {SETTINGS.fake_steps}}
    assert all(torch.equal(tensor, real[name]) for name, tensor in networks[1].module.state_dict().items())
    assert [group["scale"] for name in ("dit", "fake") for group in stage.optimizers[name].param_groups] == [1.0, 2.0]


def test_validation_repeats_and_changes_nothing(clips: list[EncodedClip]) -> None:
    stage = stage_of(clips)
    before = weights(stage, "dit")
    first = stage.validate()
    assert first == stage.validate()
    assert first["loss"] > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(stage, "dit").items())


def test_settings_choose_the_rollout(clips: list[EncodedClip]) -> None:
    roller = make_roller(SMALL, replace(SETTINGS, clean_history=True, replaces_sink=False))
    assert roller.rules == Rules(clean_history=True)
    assert roller.window.late_index is None
    assert make_roller(SMALL, SETTINGS).window.late_index == 4


def test_adapters_are_all_that_is_trained_of_a_generator_with_them(clips: list[EncodedClip]) -> None:
    dit = adapted()
    before = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    networks = three(dit)
    Distillation(0, SETTINGS, make_roller(SMALL, SETTINGS), networks, clips, clips[:1]).step(1)
    moved = [name for name, tensor in dit.state_dict().items() if not torch.equal(tensor, before[name])]
    assert moved
    assert all("lora" in name for name in moved)
