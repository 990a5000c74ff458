"""Adapters in training against adapters as the core merges them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from live_avatar.model.dit import CausalDiT
from live_avatar.model.linears import is_lora_target
from live_avatar.weights.lora import PREFIX, LoRA, MergedWeights
from live_avatar.weights.tensors import SafetensorsWeights
from tests.tolerances import FLOAT32, STREAMED
from tests.training.conftest import SMALL, drawn_clip, drawn_network, relative_error
from training.checkpoints import save_weights
from training.config import LoRAConfig
from training.init import fresh
from training.lora import GENERATOR, Adapter, adapt, draw_factors, merged, save_adapter
from training.window import Place, Window

SETTINGS = LoRAConfig(rank=4, alpha=6.0)


def adapted(speaks: bool = True) -> CausalDiT:
    dit = drawn_network()
    adapt(dit, SETTINGS)
    draw_factors(dit, torch.Generator().manual_seed(3))
    if speaks:
        draw = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for name, parameter in dit.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.2, generator=draw)
    return dit


@torch.no_grad()
def velocity(dit: CausalDiT) -> Tensor:
    window, clip = Window(SMALL, 2), drawn_clip(2)
    return window.whole(dit, window.open(dit, clip), Place(0, 30), clip.latents, 0.5)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """The base network and the adapter of `adapted()`."""
    base, adapter = tmp_path / "dit.safetensors", tmp_path / "adapter.safetensors"
    save_weights(base, drawn_network().state_dict())
    save_adapter(adapter, Adapter(adapted(), GENERATOR))
    return base, adapter


def test_a_fresh_adapter_changes_nothing() -> None:
    assert torch.equal(velocity(adapted(speaks=False)), velocity(drawn_network()))
    assert relative_error(velocity(adapted()), velocity(drawn_network())) > 0.01


def test_the_adapted_network_is_the_merged_one(files: tuple[Path, Path]) -> None:
    """By the core's merging of the file that is written here, which finds alpha and rank in it."""
    base, adapter = files
    weights = MergedWeights(SafetensorsWeights(base), LoRA(adapter))
    whole = fresh(SMALL.dit, torch.Generator())
    whole.load_state_dict({name: weights.read(name) for name in weights.shapes()})
    assert relative_error(velocity(whole), velocity(adapted())) <= STREAMED
    assert relative_error(velocity(drawn_network()), velocity(adapted())) > 0.01


def test_our_merging_is_the_cores(files: tuple[Path, Path]) -> None:
    base, adapter = files
    theirs = MergedWeights(SafetensorsWeights(base), LoRA(adapter, alpha=SETTINGS.alpha))
    ours = merged(adapted())
    assert ours.keys() == theirs.shapes().keys()
    assert all(relative_error(ours[name], theirs.read(name)) <= FLOAT32 for name in ours)
    plain = drawn_network()
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in merged(plain).items())


def test_every_target_has_factors_in_the_official_names(files: tuple[Path, Path]) -> None:
    modules = {name for name, _ in drawn_network().named_modules() if is_lora_target(name)}
    expected = {f"{PREFIX}{name}.lora_{side}.default.weight" for name in modules for side in "AB"}
    with safe_open(files[1], framework="pt") as file:
        assert set(file.keys()) == expected
        assert float(file.metadata()["lora_alpha"]) == SETTINGS.alpha


def test_only_factors_are_trained() -> None:
    dit = adapted()
    assert {name.rpartition(".lora_")[2] for name, one in dit.named_parameters() if one.requires_grad} == {
        "A.dit.weight",
        "B.dit.weight",
    }
