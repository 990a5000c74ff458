"""What every process of `test_distributed.py` runs: `python -m tests.training.worker FOLDER` trains in that folder."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from tests.training.conftest import SMALL, drawn_clip, drawn_network, handlers_of_signals, restore_handlers, three
from training import distributed, loop
from training.checkpoints import save_checkpoint
from training.config import DistillationStage, DiTStage
from training.loop import TrainingStage, train
from training.matching import FlowMatching, movement
from training.roles import whole
from training.stage1 import ForcingLoss
from training.stage2 import Distillation, make_roller
from training.window import Window

FORCING = DiTStage(
    steps=3, batch=2, learning_rate=1e-3, blocks=2, far_share=0.5, ema=0.9, warmup_steps=0, checkpoint_every=1
)
DISTILLATION = DistillationStage(
    steps=3,
    batch=2,
    learning_rate=1e-3,
    fake_learning_rate=1e-3,
    fake_steps=1,
    blocks=2,
    far_share=0.5,
    ema=0.9,
    warmup_steps=0,
    checkpoint_every=1,
)
STAGES = {"stage1": FORCING, "stage2": DISTILLATION}


def new_stage(name: str) -> TrainingStage:
    """TrainingStage 1 for its gradients through the history, stage 2 for its many passes before a step."""
    clips = [drawn_clip(3, seed) for seed in range(2)]
    if name == "stage1":
        loss = ForcingLoss(Window(SMALL, 2), movement(clips, 0.5), 0.5)
        return FlowMatching("stage1", 0, FORCING, whole(drawn_network()), loss, clips, clips)
    networks = three()
    return Distillation(0, DISTILLATION, make_roller(SMALL, DISTILLATION), networks, clips, clips[:1])


def one_step(name: str, folder: Path) -> None:
    """Goes on with a run until one of its processes, the first, gets a signal in the next step."""
    stage = new_stage(name)
    step = stage.step

    def stopped(number: int) -> dict[str, float]:
        if distributed.is_main():
            os.kill(os.getpid(), signal.SIGTERM)
        return step(number)

    stage.step = stopped  # type: ignore[method-assign]
    handlers = handlers_of_signals()
    with suppress(KeyboardInterrupt):
        train(stage, STAGES[name], folder / name, {}, quiet=True)
    restore_handlers(handlers)


def slow_save(*told: Any) -> None:
    """The first process is the last one that is ready: if the others did not wait, they would begin anew."""
    time.sleep(1)
    save_checkpoint(*told)


def run(folder: Path) -> None:
    """Two steps of each stage, the second one by a run that takes up the first one's."""
    for name in STAGES:
        for _ in range(2):
            one_step(name, folder)


def main() -> None:
    torch.set_num_threads(1)
    loop.save_checkpoint = slow_save  # type: ignore[attr-defined]
    distributed.join()
    try:
        run(Path(sys.argv[1]))
    finally:
        distributed.leave()


if __name__ == "__main__":
    main()
