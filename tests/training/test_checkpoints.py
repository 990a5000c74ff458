"""Files of a run are whole at any time, and a run takes up its own only."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from live_avatar.errors import CheckpointError
from tests.support.training import fill_the_disk
from training.checkpoints import (
    load_checkpoint,
    load_weights,
    restore,
    save_checkpoint,
    save_weights,
    write_whole,
)
from training.errors import TrainingError

IDENTITY = {"preset": "small", "vae.steps": 6}
STATE = {"step": 3, "modules": {"net": {"weight": torch.arange(4.0)}}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.pt"


def test_a_checkpoint_comes_back(path: Path) -> None:
    assert load_checkpoint(path, IDENTITY) is None
    save_checkpoint(path, IDENTITY, STATE)
    state = load_checkpoint(path, IDENTITY)
    assert state is not None
    assert state["step"] == 3
    assert torch.equal(state["modules"]["net"]["weight"], torch.arange(4.0))


def test_a_full_disk_leaves_the_older_checkpoint(path: Path) -> None:
    save_checkpoint(path, IDENTITY, STATE)
    older = path.read_bytes()
    fill_the_disk(path)
    with pytest.raises(TrainingError) as raised:
        save_checkpoint(path, IDENTITY, {**STATE, "step": 4})
    assert str(raised.value) == (
        f"{path} cannot be written (No space left on device); the older one is whole. Make room on that disk and run "
        "the same command again: it goes on from there."
    )
    assert path.read_bytes() == older
    assert list(path.parent.iterdir()) == [path]


def test_weights_that_cannot_be_written_leave_nothing(tmp_path: Path) -> None:
    path, limits = tmp_path / "net.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(TrainingError, match=r"net.safetensors cannot be written \(File too large\); there is none"):
            save_weights(path, nn.Linear(30, 20).state_dict())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_no_part_of_a_file(path: Path) -> None:
    def interrupted(place: Path) -> None:
        place.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, interrupted)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("kept", [0, 10, 500])
def test_a_damaged_checkpoint_is_refused(path: Path, kept: int) -> None:
    save_checkpoint(path, IDENTITY, STATE)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=rf"is not a whole checkpoint \(.+\); remove {path.parent} to begin"):
        load_checkpoint(path, IDENTITY)


def test_code_in_a_checkpoint_is_not_run(path: Path) -> None:
    torch.save({"format": 1, "identity": IDENTITY, "step": Path("x")}, path)
    with pytest.raises(CheckpointError, match="is not a whole checkpoint"):
        load_checkpoint(path, IDENTITY)


def test_another_runs_checkpoint_is_refused_by_what_differs(path: Path) -> None:
    save_checkpoint(path, IDENTITY, STATE)
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(path, {**IDENTITY, "vae.steps": 7})
    assert str(raised.value) == (
        f"{path} was made with vae.steps 6, but this run has 7; give the run's own settings, or remove {path.parent} "
        "to begin that stage anew."
    )


def test_another_format_is_refused(path: Path) -> None:
    torch.save({"format": 0, "identity": {}}, path)
    with pytest.raises(CheckpointError, match="has format 0, expected 1; remove"):
        load_checkpoint(path, {})


def test_tensors_of_another_shape_or_name_are_refused() -> None:
    linear = nn.Linear(3, 2)
    with pytest.raises(CheckpointError, match=r"run, net: tensor 'weight' has shape \[2, 4\], expected \[2, 3\]"):
        restore(linear, {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, "run, net")
    with pytest.raises(CheckpointError, match="run, net lacks 1 tensors, such as 'bias'"):
        restore(linear, {"weight": torch.zeros(2, 3)}, "run, net")


def test_weights_come_back_frozen_or_to_be_trained(tmp_path: Path) -> None:
    path, linear = tmp_path / "net.safetensors", nn.Linear(3, 2)
    save_weights(path, linear.state_dict())
    for trainable in (False, True):
        with torch.device("meta"):
            other = nn.Linear(3, 2)
        load_weights(path, other, trainable)
        assert torch.equal(other.weight, linear.weight)
        assert {one.requires_grad for one in other.parameters()} == {trainable}


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match=r"net\.safetensors"):
        load_weights(path, nn.Linear(3, 2))
