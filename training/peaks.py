"""Steps of a run of adapters on clips of noise, measured against the plan: `python -m training.peaks --config C`.

It takes real optimiser steps with the checkpoint of the configuration, in one process or under torchrun, and compares
the most bytes of live tensors with the plan. The last line is the report as JSON; --report also writes it.

A process alone is measured exactly: every storage of torch counts once. Of several the bytes that each holds of the
base, the adapters and their moments are given, and the most resident memory.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist

from live_avatar.config import MOTION_LATENTS, Preset
from live_avatar.environment import environment
from live_avatar.errors import ConfigError
from training import distributed, stage1, stage2
from training.checkpoints import write_json
from training.command import FILE, reported
from training.config import AdapterConfig, load
from training.encoded import EncodedClip
from training.loop import EMA, TrainingStage, generator
from training.lora import GENERATOR
from training.matching import FlowMatching
from training.memory import LiveBytes, status_bytes
from training.plan import PEAK_TFLOPS, UTILISATION, StagePlan, make_plan
from training.roles import FAKE, SharedBase, open_base

CLIPS = 2


def noise_clip(system: Preset, blocks: int, draw: torch.Generator) -> EncodedClip:
    """A clip of noise in the shapes of a preset."""
    stream, dit = system.stream, system.dit
    grid = (stream.latent_height, stream.latent_width)
    motion = torch.randn(1, 16, MOTION_LATENTS, *grid, generator=draw)
    states = torch.randn(blocks, dit.audio_states, dit.audio_dim, stream.block_frames, generator=draw)
    text = torch.randn(dit.text_len, dit.text_dim, generator=draw)
    latents = torch.randn(1, 16, blocks * stream.frames_per_block, *grid, generator=draw)
    return EncodedClip(motion[:, :, :1], motion, text, states, states, latents)


def noise_clips(config: AdapterConfig, name: str) -> list[EncodedClip]:
    """The clips of a stage."""
    draw = generator(config.seed, "noise")
    return [noise_clip(config.system, getattr(config, name).blocks, draw) for _ in range(CLIPS)]


def new_stage(config: AdapterConfig, name: str, clips: list[EncodedClip]) -> tuple[TrainingStage, SharedBase]:
    """A stage with new adapters."""
    settings, system = getattr(config, name), config.system
    if name == stage1.NAME:
        base = open_base(config, (GENERATOR,))
        loss = stage1.make_loss(system, settings, clips)
        return FlowMatching(name, config.seed, settings, base.role(GENERATOR), loss, clips, clips), base
    base = open_base(config, (GENERATOR, FAKE))
    networks = (base.role(GENERATOR), base.role(None), base.role(FAKE))
    roller = stage2.make_roller(system, settings)
    return stage2.Distillation(config.seed, settings, roller, networks, clips, clips), base


def measure(config: AdapterConfig, name: str, steps: int, plan: StagePlan) -> dict[str, Any]:
    """Takes steps of a stage; returns their figures, times and memory beside the plan."""
    alone = distributed.world() == 1
    clips = noise_clips(config, name)
    with LiveBytes() as live:
        stage, base = new_stage(config, name, clips)
        average = EMA(stage.modules, getattr(config, name).ema)
        figures = []
        for number in range(1, steps + 1):
            began = time.monotonic()
            made = stage.step(number)
            average.update(number)
            figures.append({"seconds": round(time.monotonic() - began, 1), **made})
        facts = {
            "held_parameter_bytes": sum(distributed.to_local(one).nbytes for one in base.network.parameters()),
            "resident_peak_bytes": status_bytes("VmHWM"),
            **({"live_peak_bytes": live.peak} if alone else {}),
        }
    everyone: list[Any] = [facts]
    if not alone:
        everyone = [None] * distributed.world()
        dist.all_gather_object(everyone, facts)
    planned = {**asdict(plan.memory), "total": plan.memory.total}
    return {"stage": name, "steps": figures, "processes": everyone, "plan": planned}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", "path", type=FILE, required=True, help="TOML file, such as training/configs/s2v_cut.toml.")
@click.option("--stage", "names", type=click.Choice([stage1.NAME, stage2.NAME]), multiple=True,
              default=(stage1.NAME, stage2.NAME), help="Stages; by default both.")  # fmt: skip
@click.option("--steps", type=click.IntRange(min=1), default=1, show_default=True, help="Steps of each stage.")
@click.option("--report", type=FILE, help="Also write the report to this JSON file.")
def main(path: Path, names: tuple[str, ...], steps: int, report: Path | None) -> None:
    """Take steps on noise, and compare memory with the plan."""
    with reported():
        config = load(path)
        if not isinstance(config, AdapterConfig):
            raise ConfigError(f"{path} has no key 'checkpoint'; only adapters of one are measured here.")
        processes = int(os.environ.get("WORLD_SIZE", "1"))  # the plan is made before they join, of one whole base
        plans = {name: make_plan(config, name, processes, PEAK_TFLOPS, UTILISATION) for name in names}
        distributed.join()
        try:
            made = {
                "command": f"python -m training.peaks --config {path} --steps {steps}"
                + "".join(f" --stage {name}" for name in names),
                "environment": environment("torch"),
                "processes": processes,
                "stages": [measure(config, name, steps, plans[name]) for name in names],
            }
        finally:
            distributed.leave()
        if distributed.rank() == 0:
            if report is not None:
                write_json(report, made)
            click.echo(json.dumps(made))


if __name__ == "__main__":
    main()
