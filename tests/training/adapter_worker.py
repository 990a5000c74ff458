"""What every process of the tests of adapters runs: `python -m tests.training.adapter_worker FOLDER [STEP [RANKS]]`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from tests.training.conftest import SMALL, drawn_clip, drawn_network
from training import distributed
from training.config import DistillationStage, DiTStage, LoRAConfig
from training.logs import CSVLog
from training.loop import LOG, TrainingStage, train
from training.lora import ADAPTER, GENERATOR, Adapter, draw_factors, save_adapter
from training.matching import FlowMatching, movement
from training.roles import FAKE, SharedBase
from training.sharded import ShardedRun
from training.stage1 import ForcingLoss
from training.stage2 import Distillation, make_roller
from training.window import Window

FORCING = DiTStage(
    steps=4, batch=2, learning_rate=1e-2, blocks=2, ema=0.9, warmup_steps=0, checkpoint_every=2, log_every=1
)
DISTILLATION = DistillationStage(
    steps=2,
    batch=2,
    learning_rate=1e-2,
    fake_learning_rate=1e-2,
    fake_steps=1,
    blocks=2,
    ema=0.9,
    warmup_steps=0,
    checkpoint_every=1,
    log_every=1,
)
STAGES = {"stage1": FORCING, "stage2": DISTILLATION}
LORA = LoRAConfig(rank=4, alpha=2.0)


def new_stage(name: str, ranks: int = 0) -> TrainingStage:
    clips = [drawn_clip(3, seed) for seed in range(2)]
    names = (GENERATOR, FAKE)
    base = SharedBase(drawn_network(), LORA, names, recompute=True, ranks=ranks)
    for seed, adapter in enumerate(names):
        draw_factors(base.network, torch.Generator().manual_seed(seed), adapter)
    if name == "stage1":
        loss = ForcingLoss(Window(SMALL, 2), movement(clips, 0.5), 0.5)
        return FlowMatching("stage1", 0, FORCING, base.role(GENERATOR), loss, clips, clips[:1])
    networks = (base.role(GENERATOR), base.role(None), base.role(FAKE))
    return Distillation(0, DISTILLATION, make_roller(SMALL, DISTILLATION), networks, clips, clips[:1])


def run(folder: Path, name: str, kill_at: int = 0, ranks: int = 0) -> None:
    """Trains a stage; with `kill_at`, the last process ends without a word in that step of its first life."""
    stage = new_stage(name, ranks)
    step = stage.step

    def watched(number: int) -> dict[str, float]:
        first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if number == kill_at and first_life and distributed.rank() == distributed.world() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(number)

    stage.step = watched  # type: ignore[method-assign]
    train(stage, STAGES[name], folder / name, {"widths": 32}, quiet=True, kind=ShardedRun)
    adapter = stage.outputs()["dit"]
    assert isinstance(adapter, Adapter)
    save_adapter(folder / name / ADAPTER, adapter)


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    return CSVLog(folder / name / LOG).rows()


def main() -> None:
    torch.set_num_threads(1)
    distributed.join()
    try:
        for name in STAGES:
            run(Path(sys.argv[1]), name, *map(int, sys.argv[2:]))
    finally:
        distributed.leave()


if __name__ == "__main__":
    main()
