"""Sharded checkpoints: exact resumption, in the background, and what a kill, a full disk or a notice leaves."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from live_avatar.errors import CheckpointError
from tests.tolerances import FLOAT32
from tests.training import adapter_worker as worker
from training.distributed import OWN_STORE
from training.errors import TrainingError
from training.loop import EMA, Progress, StageRun, TrainingStage, train
from training.lora import ADAPTER
from training.sharded import FOLDER, ShardedRun

ROOT = Path(__file__).parents[2]
IDENTITY = {"widths": 32}
Before = Callable[[int], None]


def run(
    stage: TrainingStage, folder: Path, before: Before | None = None, kind: type[StageRun] = ShardedRun
) -> Progress:
    step = stage.step

    def watched(number: int) -> dict[str, float]:
        if before is not None:
            before(number)
        return step(number)

    stage.step = watched  # type: ignore[method-assign]
    return train(stage, worker.FORCING, folder, IDENTITY, quiet=True, kind=kind)


def weights(stage: TrainingStage) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in stage.modules["dit"].state_dict().items()}


def saved(folder: Path) -> list[str]:
    return sorted(one.name for one in (folder / FOLDER).iterdir())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A run with the checkpoints of one process, and its weights."""
    folder, stage = tmp_path_factory.mktemp("uninterrupted"), worker.new_stage("stage1")
    run(stage, folder, kind=StageRun)
    return folder, weights(stage)


def test_a_run_that_was_killed_goes_on_to_the_same_weights(
    tmp_path: Path, uninterrupted: tuple[Path, dict[str, Tensor]]
) -> None:
    """The checkpoint of step 2 was being written when step 4 crashed; step 3 is done again."""

    def crash(number: int) -> None:
        if number == 4:
            raise MemoryError

    with pytest.raises(MemoryError):
        run(worker.new_stage("stage1"), tmp_path, crash)
    (tmp_path / FOLDER / "step-000000003.partial").mkdir()  # as a kill in the middle leaves it
    stage = worker.new_stage("stage1")
    begun: list[int] = []
    assert run(stage, tmp_path, begun.append).step == 4
    assert begun == [3, 4]
    assert saved(tmp_path) == ["step-000000002", "step-000000004"]
    folder, expected = uninterrupted
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(stage).items())
    logs = ("log.csv", "validation.csv")
    assert all((tmp_path / name).read_text() == (folder / name).read_text() for name in logs)


def test_a_checkpoint_is_of_its_step_whatever_comes_while_it_is_written(tmp_path: Path) -> None:
    stage = worker.new_stage("stage1")
    one = ShardedRun(stage, worker.FORCING, tmp_path, IDENTITY, EMA(stage.modules, 0.9), Progress(7))
    before = weights(stage)
    one.save()
    with torch.no_grad():
        for parameter in stage.modules["dit"].parameters():
            parameter.fill_(5.0)
    one.settle(wait=True)
    other = worker.new_stage("stage1")
    again = ShardedRun(other, worker.FORCING, tmp_path, IDENTITY, EMA(other.modules, 0.9))
    again.resume()
    assert again.progress.step == 7
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(other).items())


def test_a_full_disk_in_the_middle_of_a_checkpoint_leaves_the_one_before(tmp_path: Path) -> None:
    """A limit on the size of files is as good: writing fails in the background at the same place."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(number: int) -> None:
        if number == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))

    try:
        with pytest.raises(TrainingError) as raised:
            run(worker.new_stage("stage1"), tmp_path, full)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(raised.value).startswith(f"the checkpoint of step 4 in {tmp_path / FOLDER} cannot be written (")
    assert "; the one of step 2 is whole. Make room on that disk" in str(raised.value)
    assert saved(tmp_path) == ["step-000000002"]
    assert run(worker.new_stage("stage1"), tmp_path).step == 4


def test_a_notice_ends_the_run_with_a_whole_checkpoint_of_the_step(tmp_path: Path) -> None:
    def notice(number: int) -> None:
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        run(worker.new_stage("stage1"), tmp_path, notice)
    assert saved(tmp_path) == ["step-000000001"]


def test_a_checkpoint_of_other_widths_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    stage = worker.new_stage("stage1")
    one = ShardedRun(stage, worker.FORCING, tmp_path, {"widths": 64}, EMA(stage.modules, 0.0), Progress(1))
    one.save()
    one.settle(wait=True)
    with pytest.raises(CheckpointError, match=r"step-0+1 was made with widths 64, but this run has 32; give the run's"):
        run(worker.new_stage("stage1"), tmp_path)
    folder = tmp_path / FOLDER / "step-000000001"
    numbers = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**numbers, "identity": IDENTITY}))
    data = folder / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"step-0+1 is not a whole checkpoint \(.+\); remove it\."):
        run(worker.new_stage("stage1"), tmp_path)
    (folder / "run.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-0+1 is not a whole checkpoint \(.+\); remove it\."):
        run(worker.new_stage("stage1"), tmp_path)


def torchrun(folder: Path, *words: str, restarts: int = 0) -> None:
    limit = ["timeout", "--kill-after", "40", "400"]  # torchrun ends its processes at SIGTERM
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), "-m", "tests.training.adapter_worker", str(folder), *words]
    environment = {**os.environ, OWN_STORE: "1"}
    done = subprocess.run([*limit, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def adapters(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {name: load_file(folder / name / ADAPTER) for name in worker.STAGES}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    for name in worker.STAGES:
        worker.run(folder, name)
    return folder


def assert_same(folder: Path, expected: Path) -> None:
    for name in worker.STAGES:
        ours, theirs = (load_file(one / name / ADAPTER) for one in (folder, expected))
        assert ours.keys() == theirs.keys()
        assert max(float((tensor - theirs[key]).abs().max()) for key, tensor in ours.items()) <= FLOAT32
        pairs = zip(worker.rows(folder, name), worker.rows(expected, name), strict=True)
        assert all(float(one["loss"]) == pytest.approx(float(other["loss"]), rel=FLOAT32) for one, other in pairs)


@pytest.mark.slow
def test_two_processes_with_a_sharded_base_give_what_one_gives(tmp_path: Path, alone: Path) -> None:
    torchrun(tmp_path)
    assert_same(tmp_path, alone)


@pytest.mark.slow
def test_two_processes_with_a_copy_each_give_what_one_gives(tmp_path: Path, alone: Path) -> None:
    torchrun(tmp_path, "0", "1")
    assert_same(tmp_path, alone)


@pytest.mark.slow
def test_a_run_goes_on_when_one_of_two_processes_is_killed(tmp_path: Path, alone: Path) -> None:
    """In step 4 of stage 1, of which the checkpoint of step 2 is whole."""
    torchrun(tmp_path, "4", restarts=1)
    assert_same(tmp_path, alone)


@pytest.mark.slow
def test_one_process_goes_on_where_two_were(tmp_path: Path, alone: Path) -> None:
    torchrun(tmp_path)
    for name in worker.STAGES:
        whole = sorted((tmp_path / name / FOLDER).iterdir())
        for later in whole[1:]:
            for file in later.iterdir():
                file.unlink()
            later.rmdir()
        worker.run(tmp_path, name)
    assert_same(tmp_path, alone)
