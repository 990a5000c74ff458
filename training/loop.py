"""The loop that every stage runs in: learning rates, logs, moving averages, checkpoints, and the ways a run ends.

A stage is its networks, its optimisers and one step; All that is random in a step comes from the step's number, so a
run that was interrupted and goes on is exactly the uninterrupted one.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from live_avatar import interrupts
from training import distributed
from training.checkpoints import State, load_checkpoint, restore, save_checkpoint
from training.config import StageConfig
from training.errors import TrainingError
from training.logs import CSVLog, Figures, mean, plot

CHECKPOINT = "checkpoint.pt"
LOG = "log.csv"
VALIDATION_LOG = "validation.csv"
PLOT = "loss.png"


class TrainingStage(Protocol):
    """What is trained, and how."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """All that a checkpoint holds and the moving average follows, by name."""
        ...

    @property
    def optimizers(self) -> Mapping[str, Optimizer]:
        """Optimisers by name. The loop sets their groups' rates; a group's `scale`, if it has one, multiplies it."""
        ...

    def step(self, number: int) -> dict[str, float]:
        """Iteration `number`, from 1: forwards, backwards, clipping, updates. Gives figures, `loss` among them.

        Everything random in it comes from `generator(seed, stage, number)`.
        """
        ...

    def validate(self) -> dict[str, float]:
        """Figures on the validation clips, always the same ones."""
        ...

    def outputs(self) -> Mapping[str, nn.Module]:
        """The networks that the stage is for, by name, to be taken once when training is over."""
        ...


@dataclass
class Progress:
    """Where a run stands. `pending` are the figures since the last row of the log."""

    step: int = 0
    elapsed_s: float = 0.0
    pending: list[dict[str, float]] = field(default_factory=list)


def generator(seed: int, *names: str | int) -> torch.Generator:
    """The random numbers of one thing, such as (seed, "vae", step): the same whenever and wherever it is done."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def learning_rate(settings: StageConfig, step: int) -> float:
    """Rises from 0 over the warm-up, then falls to `final_rate` of itself as a cosine; `step` counts from 1."""
    if step <= settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    part = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    floor = settings.final_rate
    return settings.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, part))))


def clip_gradients(parameters: list[nn.Parameter], clip_norm: float) -> float:
    """Scales the gradients down to a norm of `clip_norm` and gives the norm that they had."""
    return float(nn.utils.clip_grad_norm_(parameters, clip_norm))


class EMA:
    """Exponential moving average of the parameters of some modules; a decay of 0 is the parameters themselves."""

    def __init__(self, modules: Mapping[str, nn.Module], decay: float) -> None:
        self._decay = decay
        self._parameters = {
            f"{part}.{name}": parameter
            for part, module in modules.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self.values = {name: value.detach().clone() for name, value in self._parameters.items()} if decay else {}

    def update(self, step: int) -> None:
        """Takes in the parameters after step `step`; the first steps weigh more, or the start would linger."""
        if self._decay:
            decay = min(self._decay, (1 + step) / (10 + step))
            held = [distributed.to_local(value) for value in self.values.values()]
            current = [distributed.to_local(self._parameters[name].detach()) for name in self.values]
            torch._foreach_lerp_(held, current, 1 - decay)

    def restore(self, values: Mapping[str, Tensor]) -> None:
        for name, value in self.values.items():
            value.copy_(distributed.shard_like(values[name], value))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the modules hold the averages."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self) -> None:
        """Exchanges averages and parameters."""
        for name, value in self.values.items():
            parameter = self._parameters[name].data
            held = parameter.clone()
            parameter.copy_(value)
            value.copy_(held)


@dataclass
class StageRun:
    """A stage on its way: what a checkpoint is made from, and put back into."""

    stage: TrainingStage
    settings: StageConfig
    folder: Path
    identity: Mapping[str, Any]
    average: EMA
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.log = CSVLog(self.folder / LOG)
        self.validation = CSVLog(self.folder / VALIDATION_LOG)

    @property
    def path(self) -> Path:
        return self.folder / CHECKPOINT

    def resume(self) -> None:
        """Takes up the last checkpoint, if there is one. Raises `CheckpointError` if it is not of this run."""
        state = load_checkpoint(self.path, self.identity)
        if state is not None:
            self._take(state)
        if distributed.is_main():
            self.log.cut(self.progress.step)
            self.validation.cut(self.progress.step)

    def _take(self, state: State) -> None:
        for name, module in self.stage.modules.items():
            restore(module, state["modules"][name], f"{self.path}, {name}")
        for name, optimizer in self.stage.optimizers.items():
            distributed.load_optimizer(optimizer, state["optimizers"][name])
        self.average.restore(state["average"])
        self.progress = Progress(state["step"], state["elapsed_s"], state["pending"])

    def save(self) -> None:
        """Writes the checkpoint. All processes call it together, one writes, and it is there when any goes on."""
        state: State = {
            "step": self.progress.step,
            "elapsed_s": self.progress.elapsed_s,
            "pending": self.progress.pending,
            "modules": {name: dict(module.state_dict()) for name, module in self.stage.modules.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.stage.optimizers.items()},
            "average": self.average.values,
        }
        whole = distributed.gathered(state)
        if distributed.is_main():
            save_checkpoint(self.path, self.identity, whole)
        distributed.barrier()

    def advance(self) -> Figures:
        """One step, its figures into the log. Raises `TrainingError` for a figure that is not finite."""
        number = self.progress.step + 1
        rate = learning_rate(self.settings, number)
        for optimizer in self.stage.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("scale", 1.0)
        figures = self.stage.step(number)
        self._check(number, figures)
        self.average.update(number)
        self.progress.step = number
        self.progress.pending.append({**figures, "learning_rate": rate})
        if number % self.settings.log_every == 0 or number == self.settings.steps:
            if distributed.is_main():
                self.log.append(number, mean(self.progress.pending))
            self.progress.pending = []
        return figures

    def _check(self, number: int, figures: Figures) -> None:
        for name, value in figures.items():
            if not math.isfinite(value):
                kept = (
                    f"{self.path} still holds an earlier step" if self.path.exists() else "no checkpoint was made yet"
                )
                raise TrainingError(
                    f"step {number} of {self.folder.name} gave {name} {value}, expected a finite number; {kept}. "
                    "Lower learning_rate or clip_norm of that stage and begin it anew."
                )

    def validate(self) -> None:
        """A row of figures of the averaged weights. Raises `TrainingError` for one that is not finite."""
        with self.average.applied():
            figures = self.stage.validate()
        self._check(self.progress.step, figures)
        if distributed.is_main():
            self.validation.append(self.progress.step, figures)
            plot(self.log, self.validation, self.folder / PLOT)


def train(
    stage: TrainingStage, settings: StageConfig, folder: Path, identity: Mapping[str, Any], quiet: bool = False
) -> Progress:
    """Runs a stage from where it stands to its last step; then its modules hold the averaged weights.

    `identity` is what the run is made of: a checkpoint in `folder` of anything else is refused. Raises
    `KeyboardInterrupt` after Ctrl-C, SIGTERM or SIGHUP, when the current step is done and saved; `TrainingError` for
    a figure that is not finite or a full disk, the last checkpoint being whole; `CheckpointError`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = StageRun(stage, settings, folder, identity, EMA(stage.modules, settings.ema))
    run.resume()
    with interrupts.deferred(), _bar(run, quiet) as bar:
        while run.progress.step < settings.steps:
            began = time.monotonic()
            figures = run.advance()
            due = run.progress.step % settings.checkpoint_every == 0 or run.progress.step == settings.steps
            if due:
                run.validate()
            run.progress.elapsed_s += time.monotonic() - began
            interrupted = distributed.any_rank(interrupts.received())
            if due or interrupted:
                run.save()
            if interrupted:
                raise KeyboardInterrupt
            bar.set_postfix(loss=f"{figures['loss']:.4g}", refresh=False)
            bar.update()
    run.average.swap()
    return run.progress


def _bar(run: StageRun, quiet: bool) -> Any:
    return tqdm(total=run.settings.steps, initial=run.progress.step, desc=run.folder.name, unit="step", disable=quiet)
