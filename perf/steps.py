"""The difference of other schedules from the released four steps, on the golden rollout (spec sections 8, 9, 19).

`python -m perf.steps` prints a Markdown table and, as the last line, the report as JSON; --json also writes it.

Every schedule denoises the same noise with the same audio, text and pictures, block by block with its own caches; the
sink is replaced at block 5. Its clean latents are compared with those of the released schedule. The golden weights are
random: they show the size of the difference between schedules, and not its effect on a picture.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from safetensors.numpy import load_file

from live_avatar.arrays import Array
from live_avatar.config import SPATIAL_STRIDE, TINY, DiTConfig, Preset, StreamConfig
from live_avatar.environment import environment
from live_avatar.errors import LiveAvatarError
from live_avatar.model.schedule import make_schedule, without_idle_step
from live_avatar.pipeline.denoiser import Denoiser, all_steps
from live_avatar.pipeline.sink import SinkSource, first_latent_frame, takes_sink
from live_avatar.runtime.torch_runtime import TorchRuntime
from live_avatar.weights.checkpoint import open_checkpoint
from live_avatar.weights.tensors import Checkpoint, SafetensorsWeights

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "data"
LAST_OF_FOUR = "after_step3"


@dataclass(frozen=True)
class Difference:
    """Difference of clean latents from the released schedule's: relative RMS, and the largest absolute one."""

    relative_rms: float
    max_abs: float

    @classmethod
    def between(cls, ours: Array, released: Array) -> Difference:
        wide = ours.astype(np.float64) - released
        return cls(float(np.sqrt((wide**2).mean() / (released.astype(np.float64) ** 2).mean())), float(abs(wide).max()))


@dataclass(frozen=True)
class Finding:
    """One schedule: its noise levels, and its difference over all blocks and in each."""

    schedule: str
    sigmas: tuple[float, ...]
    all_blocks: Difference
    blocks: tuple[Difference, ...]


def golden_preset(folder: Path) -> Preset:
    """The golden run's transformer and geometry; the other networks are `TINY`'s and are not run."""
    values = json.loads((folder / "config.json").read_text())
    states = SafetensorsWeights(folder / "dit_weights.safetensors").shapes()["casual_audio_encoder.weights"][1]
    own = {field.name for field in dataclasses.fields(DiTConfig)} - {"audio_states", "audio_inject_layers"}
    dit = DiTConfig(
        **{name: values["dit"][name] for name in own},
        audio_states=states,
        audio_inject_layers=tuple(values["dit"]["audio_inject_layers"]),
    )
    run = values["run"]
    return dataclasses.replace(
        TINY,
        name="golden",
        dit=dit,
        speech=dataclasses.replace(TINY.speech, hidden_size=dit.audio_dim, num_hidden_layers=states - 1),
        text=dataclasses.replace(TINY.text, d_model=dit.text_dim),
        stream=StreamConfig(
            height=SPATIAL_STRIDE * run["lat_h"],
            width=SPATIAL_STRIDE * run["lat_w"],
            frames_per_block=run["frames_per_block"],
            window_blocks=run["blocks_per_ring"],
        ),
    )


def golden_checkpoint(folder: Path, preset: Preset) -> Checkpoint:
    """The golden transformer under a preset of its sizes."""
    rest = open_checkpoint(preset)
    return dataclasses.replace(
        rest, parts={**rest.parts, "dit": SafetensorsWeights(folder / "dit_weights.safetensors")}
    )


def rollout(checkpoint: Checkpoint, inputs: Mapping[str, Array]) -> list[Array]:
    """Clean latents [1, 16, F, h, w] of every golden block, by the checkpoint's own schedule."""
    runtime = TorchRuntime(checkpoint)
    stream, dit = runtime.preset.stream, runtime.preset.dit
    context = inputs["in/context"]
    text = np.pad(context, ((0, dit.text_len - len(context)), (0, 0)))
    source = SinkSource(inputs["in/ref_latents"], inputs["in/motion_latents"], text)
    denoiser = Denoiser(runtime, all_steps(stream.steps))
    state = denoiser.open(denoiser.prefill(source))
    tokens = runtime.graph("audio_tokens")
    weight = np.ones((1, stream.frames_per_block, stream.frame_tokens), dtype=np.float32)
    clean: list[Array] = []
    for block in range(sum(name.startswith("in/noise/") for name in inputs)):
        if takes_sink(block, stream):
            state.sink = denoiser.prefill(source.replaced(first_latent_frame(clean[0])))
        columns = slice(block * stream.block_frames, (block + 1) * stream.block_frames)
        spoken = tokens.run({"states": inputs["in/audio"][0, :, :, columns]})
        audio = {name: made[None] for name, made in spoken.items()} | {"audio_weight": weight}
        clean.append(denoiser.run(state, inputs[f"in/noise/block{block}"][None], audio))
    return clean


def schedules(stream: StreamConfig) -> dict[str, StreamConfig]:
    """The schedules that are compared with the released four steps."""
    return {
        "3 steps, the idle one dropped": without_idle_step(stream),
        **{f"{steps} steps as released": dataclasses.replace(stream, steps=steps) for steps in (3, 2, 8)},
    }


def measure(folder: Path) -> tuple[float, list[Finding]]:
    """Largest error of the four steps against the golden latents, and the difference of each other schedule."""
    preset, inputs = golden_preset(folder), load_file(folder / "rollout.safetensors")

    def latents(stream: StreamConfig) -> list[Array]:
        return rollout(golden_checkpoint(folder, dataclasses.replace(preset, stream=stream)), inputs)

    released = latents(preset.stream)
    error = max(
        float(abs(latent[0] - inputs[f"tpp/latent/block{block}/{LAST_OF_FOUR}"]).max())
        for block, latent in enumerate(released)
    )
    found = []
    for name, stream in schedules(preset.stream).items():
        ours = latents(stream)
        blocks = tuple(Difference.between(*pair) for pair in zip(ours, released, strict=True))
        everything = Difference.between(np.stack(ours), np.stack(released))
        found.append(Finding(name, make_schedule(stream).sigmas, everything, blocks))
    return error, found


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread: the tensors are too small for several cores, and the order of sums stays the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def table(found: Sequence[Finding]) -> str:
    """Markdown: a row per schedule; relative RMS / largest absolute difference of all blocks, the first, the last."""
    rows = [["schedule", "all blocks", "first block", "last block"], ["---"] * 4]
    for finding in found:
        shown = (finding.all_blocks, finding.blocks[0], finding.blocks[-1])
        rows.append([finding.schedule, *(f"{one.relative_rms:.4f} / {one.max_abs:.3f}" for one in shown)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def report(folder: Path, error: float, found: Sequence[Finding]) -> dict[str, Any]:
    sizes = golden_preset(folder)
    return {
        "command": "python -m perf.steps --json perf/results/steps.json",
        "measured": "clean latents of the golden rollout, against the released schedule of four steps",
        "weights": "random (golden): the size of the effect, not what it does to a picture",
        "model": {"dim": sizes.dit.dim, "layers": sizes.dit.num_layers, "latents": sizes.stream.latent_shape},
        "environment": environment("torch", "numpy"),
        "four_steps_from_golden_max_abs": error,
        "results": [asdict(finding) for finding in found],
    }


@click.command()
@click.option(
    "--golden",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=GOLDEN,
    help="Folder of golden data; the checkout's by default.",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the report to this file.")
def main(golden: Path, json_path: Path | None) -> None:
    """Compare schedules with the released four steps, on the golden rollout."""
    try:
        with one_thread():
            error, found = measure(golden)
    except (LiveAvatarError, OSError) as problem:
        raise click.ClickException(str(problem)) from problem
    figures = report(golden, error, found)
    click.echo(table(found))
    click.echo("Difference of clean latents from the released four steps: relative RMS / largest. Weights are random.")
    if json_path:
        json_path.write_text(json.dumps(figures, indent=1) + "\n")
    click.echo(json.dumps(figures))


if __name__ == "__main__":
    main()
