"""The training loop of every stage: learning rates, logs, moving averages, checkpoints, and interruption.

A stage gives its networks, its optimisers and one step. Everything random in a step depends on the step's number, so a
resumed run gives exactly the result of an uninterrupted one.
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
    """A stage: its networks, optimisers and step."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Modules by name, for the checkpoint and the moving average."""
        ...

    @property
    def optimizers(self) -> Mapping[str, Optimizer]:
        """Optimisers by name. The loop sets each group's learning rate, multiplied by its optional `scale`."""
        ...

    def step(self, number: int) -> dict[str, float]:
        """Iteration `number`, from 1: forward, backward, clipping, updates. Returns figures, with `loss`.

        Everything random in it comes from `generator(seed, stage, number)`.
        """
        ...

    def validate(self) -> dict[str, float]:
        """Figures on the validation clips, always the same ones."""
        ...

    def outputs(self) -> Mapping[str, nn.Module]:
        """The trained networks by name; call it once, after training."""
        ...


@dataclass
class Progress:
    """State of a run. `pending` are the figures since the last row of the log."""

    step: int = 0
    elapsed_s: float = 0.0
    pending: list[dict[str, float]] = field(default_factory=list)


def generator(seed: int, *names: str | int) -> torch.Generator:
    """The random numbers for a key, such as (seed, "vae", step): the same in every run and process."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def learning_rate(settings: StageConfig, step: int) -> float:
    """Learning rate: a rise from 0 in the warm-up, then a cosine to `final_rate` of the peak; `step` counts from 1."""
    if step <= settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    part = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    floor = settings.final_rate
    return settings.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, part))))


def clip_gradients(parameters: list[nn.Parameter], clip_norm: float) -> float:
    """Scales the gradients down to a norm of `clip_norm`; returns the norm before."""
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
        """Adds the parameters after step `step`; the first steps have more weight, so that the start is forgotten."""
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
    """A running stage, which is saved to and restored from a checkpoint."""

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
        """Restores the last checkpoint, if there is one. Raises `CheckpointError` if it is of another run."""
        state = load_checkpoint(self.path, self.identity)
        if state is not None:
            self._take(state)
        self.cut_logs()

    def is_saved(self) -> bool:
        """Whether there is a checkpoint."""
        return self.path.exists()

    def settle(self, wait: bool) -> None:
        """Ends what saving has left to do; only a kind of run that saves in the background has any."""

    def cut_logs(self) -> None:
        """Drops the rows of steps that are done again."""
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
        """Writes the checkpoint. All processes call it together; one writes, and the others wait for it."""
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
        """Does one step and logs its figures. Raises `TrainingError` for a figure that is not finite."""
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
                kept = f"{self.path} still holds an earlier step" if self.is_saved() else "no checkpoint was made yet"
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
    stage: TrainingStage,
    settings: StageConfig,
    folder: Path,
    identity: Mapping[str, Any],
    quiet: bool = False,
    kind: type[StageRun] = StageRun,
) -> Progress:
    """Runs a stage from its last checkpoint to its last step; then its modules hold the averaged weights.

    A checkpoint in `folder` with another `identity` is refused with `CheckpointError`. Raises `KeyboardInterrupt` after
    Ctrl-C, SIGTERM or SIGHUP, when the current step is done and saved, and `TrainingError` for a figure that is not
    finite or a full disk; the last checkpoint stays complete. `kind` says how checkpoints are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    run = kind(stage, settings, folder, identity, EMA(stage.modules, settings.ema))
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
            run.settle(wait=False)
            if due or interrupted:
                run.save()
            if interrupted:
                run.settle(wait=True)
                raise KeyboardInterrupt
            bar.set_postfix(loss=f"{figures['loss']:.4g}", refresh=False)
            bar.update()
        run.settle(wait=True)
    run.average.swap()
    return run.progress


def _bar(run: StageRun, quiet: bool) -> Any:
    return tqdm(total=run.settings.steps, initial=run.progress.step, desc=run.folder.name, unit="step", disable=quiet)
