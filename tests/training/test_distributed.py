"""Two gloo processes with sharded weights take the steps that one takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tolerances import FLOAT32
from tests.training import worker
from training import distributed

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return worker.run()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("together") / "made.pt"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "tests.training.worker", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    made: dict[str, Any] = torch.load(path)
    return made


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_two_processes_give_the_figures_of_one(alone: dict[str, Any], together: dict[str, Any], stage: str) -> None:
    """Of a step, of the next one after a resumption, and of validation."""
    pairs = zip(alone[stage]["figures"], together[stage]["figures"], strict=True)
    assert all(theirs == pytest.approx(ours, rel=FLOAT32) for ours, theirs in pairs)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_two_processes_leave_the_weights_and_moments_of_one(
    alone: dict[str, Any], together: dict[str, Any], stage: str
) -> None:
    ours, theirs = (dict(flat(made[stage])) for made in (alone, together))
    assert ours.keys() == theirs.keys()
    assert any("exp_avg_sq" in name for name in ours)
    worst = {name: float((theirs[name] - tensor).abs().max()) for name, tensor in ours.items()}
    assert max(worst.values()) <= FLOAT32, max(worst, key=worst.__getitem__)


def flat(state: Any, prefix: str = "") -> Any:
    """Every tensor of a nest of dicts, by its path."""
    if isinstance(state, Tensor):
        yield prefix, state
    elif isinstance(state, dict):
        for name, value in state.items():
            yield from flat(value, f"{prefix}/{name}")


def test_a_process_on_its_own_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    distributed.join()
    assert (distributed.world(), distributed.rank(), distributed.is_main()) == (1, 0, True)
    assert distributed.mean(2.5) == 2.5
    tensor = torch.ones(2)
    assert distributed.gathered({"a": [tensor]})["a"][0] is tensor
    assert distributed.spread(tensor, tensor) is tensor
    distributed.leave()
