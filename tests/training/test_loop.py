"""How a stage runs, and every way in which it ends: at its last step, by Ctrl-C, by a figure that is not finite."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from live_avatar.errors import CheckpointError
from tests.support.training import fill_the_disk, flat
from tests.training.conftest import (
    SMALL,
    drawn_clip,
    drawn_network,
    handlers_of_signals,
    restore_handlers,
    three,
    toy_config,
)
from training.config import StageConfig, TeacherStage
from training.encoders import EncoderTraining
from training.errors import TrainingError
from training.logs import CSVLog
from training.loop import CHECKPOINT, EMA, LOG, PLOT, VALIDATION_LOG, Progress, TrainingStage, learning_rate, train
from training.matching import FlowMatching, movement
from training.roles import whole
from training.stage2 import Distillation, make_roller
from training.teacher import TeacherLoss
from training.vae import VAETraining, make_stage
from training.window import Window

STEPS = 6
IDENTITY = {"preset": "small"}
SETTINGS = TeacherStage(
    steps=STEPS, batch=1, learning_rate=1e-3, blocks=2, warmup_steps=2, ema=0.9, checkpoint_every=2, log_every=4
)


def new_teacher(settings: TeacherStage = SETTINGS) -> FlowMatching:
    clips = [drawn_clip(3, seed) for seed in range(2)]
    loss = TeacherLoss(Window(SMALL, 2), movement(clips, 0.5), 0.5, 0.1)
    return FlowMatching("teacher", 0, settings, whole(drawn_network()), loss, clips, clips[:1])


def new_distillation() -> Distillation:
    settings = replace(toy_config().stage2, **common())
    clips = [drawn_clip(3, seed) for seed in range(2)]
    return Distillation(0, settings, make_roller(SMALL, settings), three(), clips, clips[:1])


def new_vae() -> VAETraining:
    config = toy_config()
    return make_stage(replace(config, vae=replace(config.vae, **common())))


def new_encoders() -> EncoderTraining:
    config = toy_config()
    return EncoderTraining(replace(config, encoders=replace(config.encoders, **common())))


def common() -> dict[str, Any]:
    names = ("steps", "warmup_steps", "ema", "checkpoint_every", "log_every")
    return {name: getattr(SETTINGS, name) for name in names}


class Watched:
    """A stage in whose steps something happens first."""

    def __init__(self, stage: TrainingStage, before: Callable[[int], None]) -> None:
        self._stage = stage
        self._before = before

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        return self._stage.modules

    @property
    def optimizers(self) -> Mapping[str, torch.optim.Optimizer]:
        return self._stage.optimizers

    def step(self, number: int) -> dict[str, float]:
        self._before(number)
        return self._stage.step(number)

    def validate(self) -> dict[str, float]:
        return self._stage.validate()

    def outputs(self) -> Mapping[str, nn.Module]:
        return self._stage.outputs()


def run(stage: TrainingStage, folder: Path, settings: StageConfig = SETTINGS) -> Progress:
    return train(stage, settings, folder, IDENTITY, quiet=True)


def left(folder: Path) -> tuple[dict[str, Any], str, str]:
    """What a run leaves: its checkpoint but for the time it took, and its logs."""
    state = torch.load(folder / CHECKPOINT)
    del state["elapsed_s"]
    return state, (folder / LOG).read_text(), (folder / VALIDATION_LOG).read_text()


def assert_same(one: Path, other: Path) -> None:
    (ours, *logs), (theirs, *other_logs) = left(one), left(other)
    assert logs == other_logs
    tensors: dict[str, Tensor] = dict(flat(theirs))
    assert dict(flat(ours)).keys() == tensors.keys()
    assert [name for name, tensor in flat(ours) if not torch.equal(tensor, tensors[name])] == []
    assert [ours[name] for name in ("step", "pending")] == [theirs[name] for name in ("step", "pending")]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "new",
    [
        new_teacher,
        pytest.param(new_distillation, marks=pytest.mark.slow),
        pytest.param(new_vae, marks=pytest.mark.slow),
        pytest.param(new_encoders, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_interrupted_is_the_uninterrupted_one(tmp_path: Path, new: Callable[[], TrainingStage]) -> None:
    """By Ctrl-C, after which step 3 is finished and saved; by a crash in step 6, after which step 5 is done again."""
    once, often = tmp_path / "once", tmp_path / "often"
    whole = new()
    run(whole, once)

    def interrupt(number: int) -> None:
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)

    def crash(number: int) -> None:
        if number == 6:
            raise MemoryError

    handlers = handlers_of_signals()
    with pytest.raises(KeyboardInterrupt):
        run(Watched(new(), interrupt), often)
    restore_handlers(handlers)
    assert torch.load(often / CHECKPOINT)["step"] == 3
    with pytest.raises(MemoryError):
        run(Watched(new(), crash), often)
    assert torch.load(often / CHECKPOINT)["step"] == 4
    last = new()
    assert run(last, often).step == STEPS
    assert_same(once, often)
    ours, theirs = (dict(flat({name: dict(m.state_dict()) for name, m in s.modules.items()})) for s in (whole, last))
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])] == []


def test_the_rows_of_the_logs_are_of_their_steps(tmp_path: Path) -> None:
    run(new_teacher(), tmp_path)
    rows = CSVLog(tmp_path / LOG).rows()
    assert [row["step"] for row in rows] == ["4", "6"]
    assert list(rows[0]) == ["step", "loss", "gradient", "learning_rate"]
    assert [row["step"] for row in CSVLog(tmp_path / VALIDATION_LOG).rows()] == ["2", "4", "6"]
    assert (tmp_path / PLOT).read_bytes().startswith(b"\x89PNG")


def test_a_run_that_is_done_is_left_as_it_is(tmp_path: Path) -> None:
    run(new_teacher(), tmp_path)
    before = left(tmp_path)
    again = new_teacher()
    assert run(Watched(again, lambda number: pytest.fail("it stepped")), tmp_path).step == STEPS
    assert left(tmp_path)[1:] == before[1:]
    assert torch.equal(again.modules["dit"].blocks[0].ffn[0].weight, averages(before[0])["blocks.0.ffn.0.weight"])


def averages(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name.removeprefix("dit."): tensor for name, tensor in state["average"].items()}


@pytest.mark.parametrize(("every", "kept", "said"), [(1, 1, "still holds an earlier step"), (6, 0, "no checkpoint")])
def test_a_figure_that_is_not_finite_stops_the_run(tmp_path: Path, every: int, kept: int, said: str) -> None:
    """A rate at which any network bursts: its first steps are finite, and the good checkpoint before it stays."""
    settings = replace(SETTINGS, learning_rate=1e-3, checkpoint_every=every)
    stage = new_teacher(settings)

    def burst(number: int) -> None:
        if number == 2:
            with torch.no_grad():
                stage.modules["dit"].head.head.weight.fill_(1e38)

    with pytest.raises(TrainingError) as raised:
        run(Watched(stage, burst), tmp_path / "teacher", settings)
    assert str(raised.value).startswith("step 2 of teacher gave loss inf, expected a finite number; ")
    assert said in str(raised.value)
    assert str(raised.value).endswith("Lower learning_rate or clip_norm of that stage and begin it anew.")
    path = tmp_path / "teacher" / CHECKPOINT
    assert (torch.load(path)["step"] if path.exists() else 0) == kept


def test_weights_that_validate_to_nothing_are_not_saved(tmp_path: Path) -> None:
    """An update may be what breaks the weights: the step's own figures were still finite."""
    settings = replace(SETTINGS, learning_rate=1e30, warmup_steps=0, ema=0.0, checkpoint_every=1)
    with pytest.raises(TrainingError, match=r"step 1 of teacher gave loss (nan|inf), expected a finite number; no"):
        run(new_teacher(settings), tmp_path / "teacher", settings)
    assert not (tmp_path / "teacher" / CHECKPOINT).exists()


def test_a_full_disk_stops_the_run_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    stage = new_teacher()

    def full(number: int) -> None:
        if number == 4:
            fill_the_disk(tmp_path / CHECKPOINT)

    with pytest.raises(TrainingError, match=r"cannot be written \(No space left on device\); the older one is whole"):
        run(Watched(stage, full), tmp_path)
    assert torch.load(tmp_path / CHECKPOINT)["step"] == 2
    assert run(new_teacher(), tmp_path).step == STEPS


def test_a_checkpoint_of_another_network_is_refused_by_the_tensor(tmp_path: Path) -> None:
    run(new_teacher(), tmp_path)
    stage = new_teacher()
    dit = stage.modules["dit"]
    dit.head.head = nn.Linear(32, 7)
    with pytest.raises(CheckpointError, match=r"checkpoint.pt, dit: tensor 'head.head.(weight|bias)' has shape"):
        run(stage, tmp_path)


def test_the_rate_rises_and_falls(tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=12, warmup_steps=2, final_rate=0.1)
    rates = [learning_rate(settings, step) / settings.learning_rate for step in (1, 2, 7, 12)]
    assert rates == pytest.approx([0.5, 1.0, 0.55, 0.1])


def test_an_average_follows_the_weights_and_can_take_their_place() -> None:
    linear = nn.Linear(1, 1, bias=False)
    linear.weight.data.fill_(0.0)
    average = EMA({"net": linear}, decay=0.5)
    linear.weight.data.fill_(1.0)
    average.update(step=100)
    assert average.values["net.weight"].item() == 0.5
    with average.applied():
        assert linear.weight.item() == 0.5
    assert linear.weight.item() == 1.0
    assert EMA({"net": linear}, decay=0.0).values == {}
