"""Checkpoints of sharded state, which every process writes its part of while training goes on.

A checkpoint is a folder `checkpoints/step-N` of `torch.distributed.checkpoint`, read by any number of processes. It has
that name only when it is whole, so a kill or a full disk costs the steps since the last one, and no more.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.optim import Optimizer

from live_avatar.errors import CheckpointError
from live_avatar.json_files import read_json
from training import distributed
from training.checkpoints import check_identity, os_error, write_json
from training.errors import TrainingError
from training.loop import Progress, StageRun

FOLDER = "checkpoints"
NUMBERS = "run.json"
PARTIAL = ".partial"
KEPT = 2
"""Whole checkpoints that are kept."""
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Writing:
    """A checkpoint that is being written: its folder, its step, and this process's part."""

    folder: Path
    step: int
    part: Future[Any]


class ShardedRun(StageRun):
    """A running stage whose checkpoints are sharded and written in the background.

    Its identity has plain JSON values.
    """

    _writing: Writing | None = None

    @property
    def path(self) -> Path:
        return self.folder / FOLDER

    def is_saved(self) -> bool:
        return bool(_whole(self.path))

    def resume(self) -> None:
        if distributed.is_main():
            for left in self.path.glob(f"*{PARTIAL}"):
                shutil.rmtree(left)
        distributed.barrier()
        saved = _whole(self.path)
        if saved:
            self._read(saved[-1])
        self.cut_logs()

    def save(self) -> None:
        """Begins to write a checkpoint, when the one before is whole. All processes call it together.

        Raises `TrainingError` if the one before could not be written.
        """
        self.settle(wait=True)
        folder = self.path / f"step-{self.progress.step:09d}{PARTIAL}"
        if distributed.is_main():
            self.path.mkdir(parents=True, exist_ok=True)
        distributed.barrier()
        state = {name: _copied(tensor) for name, tensor in self._tensors()}
        _expect_one_process()
        part = async_save(state, checkpoint_id=folder, process_group=self._group, no_dist=self._group is None)
        self._writing = Writing(folder, self.progress.step, cast("Future[Any]", part))
        self._numbers = {**asdict(self.progress), "identity": dict(self.identity)}

    def settle(self, wait: bool) -> None:
        """Gives the checkpoint that is being written its name, once all parts are there. All processes call it.

        Raises `TrainingError` if a part could not be written; the last whole checkpoint stays.
        """
        writing = self._writing
        if writing is None:
            return
        if not wait and distributed.any_rank(not writing.part.done()):
            return
        fault = writing.part.exception()
        if distributed.any_rank(fault is not None):
            self._writing = None
            self._give_up(writing, fault)
        if distributed.is_main():
            self._name(writing)
        distributed.barrier()
        self._writing = None

    def _name(self, writing: Writing) -> None:
        whole = writing.folder.with_suffix("")
        write_json(writing.folder / NUMBERS, self._numbers)
        shutil.rmtree(whole, ignore_errors=True)
        writing.folder.rename(whole)
        _flush(self.path)
        for old in _whole(self.path)[:-KEPT]:
            shutil.rmtree(old)

    def _give_up(self, writing: Writing, fault: BaseException | None) -> None:
        distributed.barrier()
        if distributed.is_main():
            shutil.rmtree(writing.folder, ignore_errors=True)
        saved = _whole(self.path)
        older = f"the one of step {_step(saved[-1])} is whole" if saved else "there is none yet"
        raise TrainingError(
            f"the checkpoint of step {writing.step} in {self.path} cannot be written ({_reason(fault)}); {older}. Make "
            "room on that disk, or mend that, and run the same command again: it goes on from there."
        ) from fault

    @cached_property
    def _group(self) -> Any:
        """A group of its own, because the background writes while the others are in use; None for one process."""
        return torch.distributed.new_group(backend="gloo") if distributed.world() > 1 else None

    def _read(self, folder: Path) -> None:
        again = f"remove {self.path.parent} to begin that stage anew"
        try:
            numbers = read_json(folder / NUMBERS)
            made_of, progress = numbers.pop("identity"), Progress(**numbers)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder} is not a whole checkpoint ({error}); remove it.") from error
        check_identity(str(folder), made_of, self.identity, f"give the run's own settings, or {again}")
        state = dict(self._tensors())
        _expect_one_process()
        try:
            load(state, checkpoint_id=folder, process_group=self._group, no_dist=self._group is None)
        except (CheckpointException, OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{folder} is not a whole checkpoint ({_reason(error)}); remove it.") from error
        self.progress = progress

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Everything that a stage goes on with, by name; the moments are made if there was no step yet."""
        for part, module in self.stage.modules.items():
            for name, tensor in module.state_dict().items():
                yield f"modules/{part}/{name}", tensor
        for part, optimizer in self.stage.optimizers.items():
            for number, state in enumerate(_states(optimizer)):
                for name, tensor in state.items():
                    yield f"optimizers/{part}/{number}/{name}", tensor
        for name, tensor in self.average.values.items():
            yield f"average/{name}", tensor


def _expect_one_process() -> None:
    """torch warns that it assumes what is meant here."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


def _states(optimizer: Optimizer) -> Iterator[dict[str, Tensor]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros(())
                state.update({name: torch.zeros_like(parameter) for name in MOMENTS})
            yield state


def _whole(path: Path) -> list[Path]:
    """The whole checkpoints, oldest first."""
    return sorted(one for one in path.glob("step-*") if one.suffix != PARTIAL)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _copied(tensor: Tensor) -> Tensor:
    """The tensor as it is now, for a writer in the background; from a GPU the writer itself copies."""
    return tensor.detach().clone() if tensor.device.type == "cpu" else tensor.detach()


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(fault: BaseException | None) -> str:
    """What went wrong, in a few words."""
    if isinstance(fault, CheckpointException) and fault.failures:
        fault = next(iter(fault.failures.values()))[0]
    cause = os_error(fault)
    if cause is not None:
        return os.strerror(cause)
    return str(fault).splitlines()[0] if fault is not None and str(fault) else "another process failed"
