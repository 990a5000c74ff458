"""Two gloo processes with sharded weights take the steps that one takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from live_avatar.errors import ConfigError
from tests.support.training import flat
from tests.tolerances import FLOAT32, STREAMED
from tests.training import worker
from training import distributed
from training.logs import CSVLog
from training.loop import CHECKPOINT, VALIDATION_LOG

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which one process trained."""
    folder = tmp_path_factory.mktemp("alone")
    worker.run(folder)
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two did."""
    folder = tmp_path_factory.mktemp("together")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    limit = ["timeout", "--kill-after", "40", "200"]  # torchrun ends its processes at SIGTERM; a kill would leave them
    command = [*limit, *torchrun, "-m", "tests.training.worker", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def saved(folder: Path, stage: str) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / stage / CHECKPOINT)
    return state


@pytest.mark.slow
@pytest.mark.parametrize("stage", worker.STAGES)
def test_two_processes_give_the_figures_of_one(alone: Path, together: Path, stage: str) -> None:
    """Of a step, of the next one after a resumption, and of validation."""
    ours, theirs = (saved(folder, stage) for folder in (alone, together))
    assert ours["step"] == theirs["step"] == 2
    pairs = zip(ours["pending"], theirs["pending"], strict=True)
    assert all(two == pytest.approx(one, rel=FLOAT32) for one, two in pairs)
    logs = zip(*(CSVLog(folder / stage / VALIDATION_LOG).rows() for folder in (alone, together)), strict=True)
    for one, two in logs:
        assert one.keys() == two.keys()
        assert float(two["loss"]) == pytest.approx(float(one["loss"]), rel=STREAMED)


@pytest.mark.slow
@pytest.mark.parametrize("stage", worker.STAGES)
def test_two_processes_leave_the_weights_moments_and_averages_of_one(alone: Path, together: Path, stage: str) -> None:
    ours, theirs = (dict(flat(saved(folder, stage))) for folder in (alone, together))
    assert ours.keys() == theirs.keys()
    assert {name.split("/")[1] for name in ours} == {"modules", "optimizers", "average"}
    worst = {name: float((theirs[name] - tensor).abs().max()) for name, tensor in ours.items()}
    assert max(worst.values()) <= FLOAT32, max(worst, key=worst.__getitem__)


def test_restarts_that_would_hang_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    sentence = "torchrun has --max-restarts 3, .*; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"
    with pytest.raises(ConfigError, match=sentence):
        distributed.join()


def test_a_process_on_its_own_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    distributed.join()
    assert (distributed.world(), distributed.rank(), distributed.is_main()) == (1, 0, True)
    assert distributed.mean(2.5) == 2.5
    tensor = torch.ones(2)
    assert distributed.gathered({"a": [tensor]})["a"][0] is tensor
    assert distributed.shard_like(tensor, tensor) is tensor
    distributed.leave()
