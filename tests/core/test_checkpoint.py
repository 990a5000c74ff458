"""Weights out of a folder and out of a seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from live_avatar.checkpoint import load_networks
from live_avatar.components import Networks
from live_avatar.config import S2V_14B, TINY
from live_avatar.errors import CheckpointError


def states(networks: Networks) -> dict[str, dict[str, Tensor]]:
    return {name: module.state_dict() for name, module in networks.parts().items()}


def same(one: Networks, other: Networks) -> bool:
    ours, theirs = states(one), states(other)
    assert [list(state) for state in ours.values()] == [list(state) for state in theirs.values()]
    return all(torch.equal(tensor, theirs[part][name]) for part in ours for name, tensor in ours[part].items())


def edited(path: Path, changes: dict[str, Tensor | None]) -> None:
    """Rewrites a file with tensors put in, or taken out where the change is None."""
    tensors = {name: changes.get(name, tensor) for name, tensor in {**load_file(path), **changes}.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


@pytest.fixture(scope="module")
def drawn() -> Networks:
    return load_networks(TINY)


@pytest.fixture
def folder(drawn: Networks, tmp_path: Path) -> Path:
    """A checkpoint as `save_file` makes it; tied tensors are stored under each of their names."""
    for part, state in states(drawn).items():
        save_file(
            {name: tensor.clone().contiguous() for name, tensor in state.items()}, tmp_path / f"{part}.safetensors"
        )
    return tmp_path


def test_saved_weights_come_back(drawn: Networks, folder: Path) -> None:
    other = replace(TINY, weight_seed=TINY.weight_seed + 100)
    assert not same(drawn, load_networks(other))
    assert same(drawn, load_networks(other, folder))


def test_the_seed_alone_decides_the_weights(drawn: Networks) -> None:
    torch.manual_seed(1)
    assert same(drawn, load_networks(TINY))


def test_loaded_networks_do_not_train(drawn: Networks) -> None:
    for module in drawn.parts().values():
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_drawn_weights_are_alive_everywhere(drawn: Networks) -> None:
    for module in drawn.parts().values():
        for name, parameter in module.named_parameters():
            assert torch.isfinite(parameter).all(), name
            assert parameter.abs().max() > 0, name


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "vae.safetensors").unlink()
    message = r"checkpoint file .*vae\.safetensors does not exist; expected a folder with vae\.safetensors in it\."
    with pytest.raises(CheckpointError, match=message):
        load_networks(TINY, folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint file .*nowhere.*dit\.safetensors does not exist"):
        load_networks(TINY, tmp_path / "nowhere")


def test_a_missing_tensor_is_named(folder: Path) -> None:
    edited(folder / "dit.safetensors", {"head.modulation": None})
    message = r"dit\.safetensors lacks 1 tensors, such as 'head\.modulation'; is it of another preset\?"
    with pytest.raises(CheckpointError, match=message):
        load_networks(TINY, folder)


def test_a_surplus_tensor_is_named(folder: Path) -> None:
    edited(folder / "text.safetensors", {"a.b": torch.zeros(1), "c.d": torch.zeros(1)})
    message = r"text\.safetensors has unknown 2 tensors, such as 'a\.b'; is it of another preset\?"
    with pytest.raises(CheckpointError, match=message):
        load_networks(TINY, folder)


def test_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    edited(folder / "dit.safetensors", {"head.modulation": torch.zeros(1, 2, 7)})
    message = r"tensor 'head\.modulation' has shape \[1, 2, 7\], expected \[1, 2, 128\]; is it of another preset\?"
    with pytest.raises(CheckpointError, match=message):
        load_networks(TINY, folder)


@pytest.mark.parametrize("kept", [0, 5, 5000])
def test_half_a_file_is_named(folder: Path, kept: int) -> None:
    path = folder / "dit.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(
        CheckpointError, match=r"dit\.safetensors is not a whole safetensors file \(.*\); fetch it again"
    ):
        load_networks(TINY, folder)


def test_the_large_preset_is_refused_before_its_memory_is_taken() -> None:
    with pytest.raises(CheckpointError, match=r"preset s2v-14b needs the official checkpoint.*; use preset tiny\."):
        load_networks(S2V_14B)
