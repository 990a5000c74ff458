"""One frozen base with adapters against three networks of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from live_avatar.model.dit import CausalDiT
from tests.tolerances import STREAMED
from tests.training.conftest import SMALL, drawn_clip, drawn_network, relative_error
from training.config import DistillationStage, LoRAConfig
from training.lora import GENERATOR, adapt
from training.memory import LiveBytes
from training.roles import FAKE, Role, SharedBase, whole
from training.stage2 import Distillation, make_roller
from training.window import Place, Window

LORA = LoRAConfig(rank=4, alpha=2.0)
SETTINGS = DistillationStage(
    steps=5, batch=1, learning_rate=1e-3, fake_learning_rate=2e-3, fake_steps=1, blocks=2, motion_weight=0.0
)
CLIPS = [drawn_clip(2, seed) for seed in range(2)]


def draw_adapter(dit: CausalDiT, name: str, seed: int) -> None:
    """Values for both factors, so that the adapter changes what the network gives."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in dit.named_parameters():
            if f".{name}." in key:
                parameter.normal_(std=0.1, generator=draw)


def shared(recompute: bool = True) -> tuple[Role, Role, Role]:
    base = SharedBase(drawn_network(), LORA, (GENERATOR, FAKE), recompute)
    draw_adapter(base.network, GENERATOR, 1)
    draw_adapter(base.network, FAKE, 2)
    return base.role(GENERATOR), base.role(None), base.role(FAKE)


def apart() -> tuple[Role, Role, Role]:
    """The same networks as three."""
    dit, fake = drawn_network(), drawn_network()
    for network, seed in ((dit, 1), (fake, 2)):
        adapt(network, LORA)
        draw_adapter(network, GENERATOR, seed)
    return whole(dit), whole(drawn_network().requires_grad_(False)), whole(fake)


def stage_of(networks: tuple[Role, Role, Role], **changes: Any) -> Distillation:
    settings = replace(SETTINGS, **changes)
    return Distillation(0, settings, make_roller(SMALL, settings), networks, CLIPS, CLIPS[:1])


def velocity(role: Role) -> Tensor:
    window = Window(SMALL, 2)
    return role(lambda dit: window.whole(dit, window.open(dit, CLIPS[0]), Place(0, 30), CLIPS[0].latents, 0.5))


def gradients(role: Role) -> list[Tensor]:
    return [parameter.grad for parameter in role.parameters if parameter.grad is not None]


@pytest.mark.parametrize("recompute", [False, True])
def test_outputs_and_gradients_are_those_of_three_networks(recompute: bool) -> None:
    """Also if the backward pass comes when another adapter takes part."""
    ours, theirs = shared(recompute), apart()
    for one, other in zip(ours, theirs, strict=True):
        assert relative_error(velocity(one), velocity(other)) <= STREAMED
    for networks in (ours, theirs):
        (velocity(networks[0]).square().mean() + 2 * velocity(networks[2]).square().mean()).backward()
    for one, other in zip(ours, theirs, strict=True):
        assert len(gradients(one)) == len(gradients(other))
        pairs = zip(gradients(one), gradients(other), strict=True)
        assert all(relative_error(a, b) <= STREAMED for a, b in pairs)
    assert len(gradients(ours[0])) == len(gradients(ours[2])) > 0


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_step_is_that_of_three_networks(accumulate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same draws: of networks apart, processes need not make the same passes."""
    ours, theirs = shared(), apart()
    theirs = (replace(theirs[0], together=True), *theirs[1:])
    figures = [stage_of(networks, accumulate=accumulate).step(1) for networks in (ours, theirs)]
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)
    for one, other in zip(ours, theirs, strict=True):
        assert all(relative_error(a, b) <= 1e-4 for a, b in zip(one.parameters, other.parameters, strict=True))


def test_the_base_has_no_gradient_and_does_not_change() -> None:
    networks = shared()
    dit = networks[0].unit.network
    before = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    stage_of(networks).step(1)
    moved = {name for name, tensor in dit.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name for name in before if "lora" in name} == moved
    assert {name for name, parameter in dit.named_parameters() if parameter.requires_grad} == moved


def test_three_networks_have_the_memory_of_one_base() -> None:
    def frozen(networks: tuple[Role, Role, Role]) -> int:
        found = {id(parameter): parameter for role in networks for parameter in role.unit.network.parameters()}
        return sum(parameter.nbytes for parameter in found.values() if not parameter.requires_grad)

    base = sum(parameter.nbytes for parameter in drawn_network().parameters())
    assert frozen(shared()) == base
    assert frozen(apart()) == 3 * base


def test_layers_are_computed_again_in_the_backward_pass() -> None:
    def peak(recompute: bool) -> int:
        role = shared(recompute)[0]
        with LiveBytes() as live:
            velocity(role).square().mean().backward()
        return live.peak

    assert peak(True) < 0.7 * peak(False)
