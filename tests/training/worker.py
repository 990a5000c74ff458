"""What every process of `test_distributed.py` runs: `python -m tests.training.worker FILE` writes what came of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from tests.training.conftest import SMALL, drawn_clip, drawn_network
from training import distributed
from training.config import DistillationStage, DiTStage
from training.loop import Stage
from training.matching import FlowMatching, movement
from training.stage1 import ForcingLoss
from training.stage2 import Distillation, make_roller
from training.window import Window

FORCING = DiTStage(steps=2, batch=2, learning_rate=1e-3, blocks=2, far_share=0.5)
DISTILLATION = DistillationStage(
    steps=2, batch=2, learning_rate=1e-3, fake_learning_rate=1e-3, fake_steps=1, blocks=2, far_share=0.5
)


def new_stages() -> dict[str, Stage]:
    """Stage 1 for its gradients through the history, stage 2 for its many passes before a step."""
    clips = [drawn_clip(3, seed) for seed in range(2)]
    loss = ForcingLoss(Window(SMALL, 2), movement(clips, 0.5), 0.5)
    networks = (drawn_network(seed=1), drawn_network(seed=2), drawn_network(seed=2))
    return {
        "stage1": FlowMatching("stage1", 0, FORCING, drawn_network(), loss, clips, clips),
        "stage2": Distillation(0, DISTILLATION, make_roller(SMALL, DISTILLATION), networks, clips, clips[:1]),
    }


def state_of(stage: Stage) -> dict[str, Any]:
    """As a checkpoint holds it: whole tensors."""
    return {
        "modules": {name: distributed.gathered(dict(one.state_dict())) for name, one in stage.modules.items()},
        "optimizers": {name: distributed.gathered(one.state_dict()) for name, one in stage.optimizers.items()},
    }


def restore(stage: Stage, state: dict[str, Any]) -> None:
    for name, module in stage.modules.items():
        distributed.load_network(module, state["modules"][name])
    for name, optimizer in stage.optimizers.items():
        distributed.load_optimizer(optimizer, state["optimizers"][name])


def run() -> dict[str, Any]:
    """By stage: figures of a step, of one that goes on from its state in new networks, and of validation."""
    made: dict[str, Any] = {}
    for name, stage in new_stages().items():
        figures = [stage.step(1)]
        resumed = new_stages()[name]
        restore(resumed, state_of(stage))
        figures += [resumed.step(2), resumed.validate()]
        made[name] = {"figures": figures, **state_of(resumed)}
    return made


def main() -> None:
    torch.set_num_threads(1)
    distributed.join()
    try:
        made = run()
        if distributed.is_main():
            torch.save(made, Path(sys.argv[1]))
    finally:
        distributed.leave()


if __name__ == "__main__":
    main()
