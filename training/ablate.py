"""The paper's ablations at a small size (Tables 3, 4 and 6): the effect of each part of the method on a run's avatar.

`python -m training.ablate --config training/configs/tiny.toml --run out/tiny` prints a Markdown table and, as the last
line, the report as JSON. Every row generates the same test clips from the same noise, once at the start of a stream and
once at its positions after a thousand seconds. It uses the rollouts of training, which equal those of the stream, and
the measures of `evaluate.py`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from live_avatar.config import FPS, Preset
from live_avatar.environment import environment
from live_avatar.graphs.components import VAEDecoder, VAEDecoderWarmUp
from live_avatar.model.dit import CausalDiT
from live_avatar.model.schedule import without_idle_step
from live_avatar.pipeline.conditioning import block_noise
from live_avatar.weights.checkpoint import load_networks, open_checkpoint
from training import stage1, stage2
from training.checkpoints import write_json
from training.command import FILE, reported
from training.config import load
from training.data.clips import Clip
from training.encoded import ClipEncoder, EncodedClip
from training.evaluate import GeneratedClip, spoken_clips, spread
from training.init import load as load_network
from training.mouth import correlation, looks_distance, measure_mouth
from training.rollout import Roller, RolloutInput, Rules
from training.run import WEIGHTS
from training.vae import channels_last
from training.window import Place, Window

LATE_S = 1000
"""Time of a stream at which every clip is generated again: with its positions, but without accumulated errors."""
UNDISTILLED_STEPS = 40


@dataclass(frozen=True)
class Variant:
    """A row: the network that generates, and its settings. `preset` has the steps and the sink."""

    name: str
    network: str
    preset: Preset
    rolls: bool = True
    clean_history: bool = False

    @property
    def nfe(self) -> int:
        """Evaluations of the network for a block."""
        return self.preset.stream.steps + self.clean_history

    def roller(self, blocks: int) -> Roller:
        return Roller(Window(self.preset, blocks, rolls=self.rolls), Rules(clean_history=self.clean_history))


CLEAN_TRAINED = "stage2, clean history"


def variants(preset: Preset, clean_trained: bool) -> list[Variant]:
    """All rows; the last two need a generator that was trained without history corrupt."""
    shorter = dataclasses.replace(preset, stream=without_idle_step(preset.stream))
    many = preset.with_stream(steps=UNDISTILLED_STEPS)
    rows = [
        Variant("as released", stage2.NAME, preset),
        Variant("without AAS", stage2.NAME, preset.with_stream(sink_update_block=None)),
        Variant("without rolling RoPE", stage2.NAME, preset, rolls=False),
        Variant("clean KV", stage2.NAME, preset, clean_history=True),
        Variant("without the idle step", stage2.NAME, shorter),
        Variant("without distillation", stage1.NAME, preset),
        Variant(f"without distillation, {UNDISTILLED_STEPS} steps", stage1.NAME, many),
    ]
    trained = [
        Variant("without history corrupt", CLEAN_TRAINED, preset),
        Variant("without history corrupt, clean KV", CLEAN_TRAINED, preset, clean_history=True),
    ]
    return rows + (trained if clean_trained else [])


@dataclass(frozen=True)
class Prepared:
    """A test clip, the conditions of a network, and the decoder's state after the stream's warm-up."""

    clip: Clip
    encoded: EncodedClip
    decoder: Sequence[Tensor]


class Studio:
    """Generates clips with any variant; all variants share the networks of a run."""

    def __init__(self, preset: Preset, weights: Path) -> None:
        networks = load_networks(open_checkpoint(preset, weights))
        channels_last(networks.vae)
        self._stream = preset.stream
        self._encoder = ClipEncoder(preset, networks)
        self._warm_up, self._decoder = VAEDecoderWarmUp(networks), VAEDecoder(networks)

    @torch.inference_mode()
    def prepare(self, clip: Clip) -> Prepared:
        blocks = len(clip.frames) // self._stream.block_frames
        encoded = self._encoder.encode(clip, self._encoder.silence(blocks))
        state = self._warm_up(encoded.motion[:, :, : self._stream.decoder_warmup_latents])
        return Prepared(clip, encoded, state)

    @torch.inference_mode()
    def take(self, dit: CausalDiT, variant: Variant, prepared: Prepared, seed: int, first_block: int) -> GeneratedClip:
        """The clip with generated frames; its first block is block `first_block` of its stream."""
        clip, stream = prepared.encoded, variant.preset.stream
        noise = [block_noise(seed, block, (1, *stream.latent_shape)) for block in range(len(clip.states))]
        roller, place = variant.roller(len(clip.states)), Place(first_block, stream.sink_distance)
        given = RolloutInput(
            clip, place, torch.from_numpy(np.concatenate(noise, axis=2)), roller.steps - 1, replaces=True
        )
        made = roller.roll_out(dit, given, torch.Generator())
        frames, *_ = self._decoder(
            made.latents, *prepared.decoder
        )  # all at once, because torch is slow with a few frames
        return GeneratedClip(prepared.clip, frames.numpy())


def figures(takes: Sequence[GeneratedClip]) -> dict[str, float]:
    """Means over clips: correlations of the mouth with the truth, and distances of the looks from the picture.

    looks: over the whole clip; last_looks: in its last second.
    """
    mouths = [(measure_mouth(take.frames, take.clip.picture), take.clip.mouth) for take in takes]
    looks = [looks_distance(take.frames, take.clip.picture) for take in takes]
    return {
        "opening": float(np.mean([correlation(seen[:, 0], true[:, 0]) for seen, true in mouths])),
        "width": float(np.mean([correlation(seen[:, 1], true[:, 1]) for seen, true in mouths])),
        "looks": float(np.mean([distance.mean() for distance in looks])),
        "last_looks": float(np.mean([distance[-FPS:].mean() for distance in looks])),
    }


def measure(
    studio: Studio, networks: Mapping[str, CausalDiT], rows: Sequence[Variant], clips: Sequence[Prepared], seeds: int
) -> Iterator[dict[str, Any]]:
    """By row: the figures at both places, each with mean, standard deviation and values over the seeds."""
    for row in rows:
        late = LATE_S * FPS // row.preset.stream.block_frames
        found: dict[str, Any] = {"name": row.name, "network": row.network, "nfe": row.nfe}
        for label, first_block in (("start", 0), ("late", late)):
            by_seed = [
                figures([studio.take(networks[row.network], row, clip, seed, first_block) for clip in clips])
                for seed in range(seeds)
            ]
            found[label] = {name: spread([one[name] for one in by_seed]) for name in by_seed[0]}
        yield found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: means and standard deviations over seeds, at the start and late."""
    columns = ("opening", "width", "looks", "last_looks")
    heads = [f"{name.replace('_', ' ')}{late}" for late in ("", ", late") for name in columns]
    lines = ["| | NFE | " + " | ".join(heads) + " |", "|---" * (len(heads) + 2) + "|"]
    for row in rows:
        cells = [row[place][name] for place in ("start", "late") for name in columns]
        lines.append(
            f"| {row['name']} | {row['nfe']} | " + " | ".join(f"{c['mean']:.2f} ± {c['sd']:.2f}" for c in cells) + " |"
        )
    return "\n".join(lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", "path", type=FILE, required=True, help="The run's configuration.")
@click.option("--run", "folder", type=FILE, required=True, help="Folder of a run that was made with --stage all.")
@click.option("--clean-trained", type=FILE, help="Run of the same networks whose stage 2 had clean_history = true.")
@click.option("--clips", "count", type=click.IntRange(2), default=8, show_default=True, help="Number of test clips.")
@click.option(
    "--blocks", type=click.IntRange(3), default=20, show_default=True, help="Number of blocks (0.48 s) of each clip."
)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Seeds of the noise.")
@click.option("--threads", type=click.IntRange(min=1), help="Number of CPU threads.")
@click.option("--report", type=FILE, help="Also write the report to this JSON file.")
def main(
    path: Path,
    folder: Path,
    clean_trained: Path | None,
    count: int,
    blocks: int,
    seeds: int,
    threads: int | None,
    report: Path | None,
) -> None:
    """Measure the effect of each part of the method, on test voices and faces."""
    with reported():
        if threads is not None:
            torch.set_num_threads(threads)
        preset = load(path).system
        networks = {stage: load_network(preset.dit, folder, stage) for stage in (stage1.NAME, stage2.NAME)}
        if clean_trained is not None:
            networks[CLEAN_TRAINED] = load_network(preset.dit, clean_trained, stage2.NAME)
        studio, drawn = Studio(preset, folder / WEIGHTS), spoken_clips(count, blocks, preset.stream.height)
        clips = [studio.prepare(clip) for clip in tqdm(drawn, unit="clips", desc="test clips")]
        chosen = variants(preset, clean_trained is not None)
        measured = measure(studio, networks, chosen, clips, seeds)
        rows = list(tqdm(measured, total=len(chosen), unit="rows", desc="ablations"))
        made = {
            "clips": count,
            "blocks": blocks,
            "late_s": LATE_S,
            "rows": rows,
            "environment": environment("torch", "numpy"),
        }
        if report is not None:
            write_json(report, made)
        click.echo(table(rows))
        click.echo(json.dumps(made))


if __name__ == "__main__":
    main()
