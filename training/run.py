"""A training run from the command line: one stage, or all stages up to weights for the export.

`python -m training.run --config training/configs/tiny.toml --stage all --out out/tiny`. Each stage writes its networks
and a record into its own folder. The same command resumes an interrupted stage and skips finished ones.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import click
import torch

from live_avatar.environment import environment
from live_avatar.errors import CheckpointError
from live_avatar.graphs.digests import file_sha256
from live_avatar.json_files import read_json
from live_avatar.model.dit import CausalDiT
from live_avatar.weights.checkpoint import open_checkpoint
from training import decoder, distributed, encoders, loop, stage1, stage2, teacher, vae
from training.checkpoints import check_identity, save_weights, write_json, write_whole
from training.command import FILE, reported
from training.config import AdapterConfig, TrainingConfig, load
from training.data.split import Split
from training.encoded import ENCODERS, FOLDER, MANIFEST, encode_split
from training.errors import TrainingError
from training.logs import CSVLog
from training.loop import TrainingStage, train
from training.lora import ADAPTER, GENERATOR, Adapter, merged, save_adapter
from training.sharded import ShardedRun
from training.shards import index_digest

RECORD = "record.json"
WEIGHTS = "weights"
"""Folder of a run with the four networks, for `live-avatar export --checkpoint`."""
DATA = (f"{FOLDER}/train/{MANIFEST}", f"{FOLDER}/validation/{MANIFEST}")
ALL = "all"
ROOT = Path(__file__).parents[1]

Facts = dict[str, Any]
Work = Callable[[Facts], Facts]
"""Runs a stage with the given identity; returns the facts of its record."""


@dataclass(frozen=True)
class Step:
    """One stage of the run: its input files and its output files, relative to the run's folder."""

    needs: tuple[str, ...]
    gives: tuple[str, ...]


STEPS: Mapping[str, Step] = {
    vae.STAGE: Step((), (vae.VAE_FILE,)),
    vae.MOUTHS: Step((vae.VAE_FILE,), (ENCODERS["vae"],)),
    "encoders": Step((), (ENCODERS["speech"], ENCODERS["text"])),
    decoder.STAGE: Step((ENCODERS["vae"],), (decoder.FILE,)),
    FOLDER: Step(tuple(ENCODERS.values()), DATA),
    teacher.NAME: Step(DATA, ("teacher/dit.safetensors",)),
    stage1.NAME: Step((*DATA, "teacher/dit.safetensors"), ("stage1/dit.safetensors",)),
    stage2.NAME: Step((*DATA, "teacher/dit.safetensors", "stage1/dit.safetensors"), ("stage2/dit.safetensors",)),
}
"""All stages in their order."""
ADAPTER_STEPS: Mapping[str, Step] = {
    stage1.NAME: Step((), (f"{stage1.NAME}/{ADAPTER}",)),
    stage2.NAME: Step((f"{stage1.NAME}/{ADAPTER}",), (f"{stage2.NAME}/{ADAPTER}",)),
}
"""The stages of adapters on a checkpoint."""
PRODUCTS = {**ENCODERS, "dit": "stage2/dit.safetensors"}
MAKERS: Mapping[str, Callable[[Any, Path], TrainingStage]] = {
    vae.STAGE: lambda config, out: vae.make_stage(config),
    vae.MOUTHS: vae.make_mouth_stage,
    "encoders": encoders.make_stage,
    decoder.STAGE: decoder.make_stage,
    teacher.NAME: teacher.make_stage,
    stage1.NAME: stage1.make_stage,
    stage2.NAME: stage2.make_stage,
}
ALONE = (vae.STAGE, vae.MOUTHS, "encoders", decoder.STAGE, FOLDER)
"""Stages with a single process, because their networks are small at every scale."""


@dataclass(frozen=True)
class TrainingRun:
    """A run: its configuration and its folder."""

    path: Path
    config: TrainingConfig | AdapterConfig
    out: Path

    @property
    def steps(self) -> Mapping[str, Step]:
        """The stages of this run."""
        return ADAPTER_STEPS if isinstance(self.config, AdapterConfig) else STEPS

    def command(self, stage: str) -> str:
        return f"python -m training.run --config {self.path} --stage {stage} --out {self.out}"

    def do(self, name: str) -> Facts:
        """Runs a stage, unless it is done; returns its record. Raises `TrainingError` and `CheckpointError`."""
        self._require(name)
        identity = self._identity(name)
        record = self._record(name, identity)
        if name == FOLDER:
            return self._encode(identity, record["seconds"] if record else 0.0)
        return record or self._train(name, identity)

    def finish(self, records: Mapping[str, Facts]) -> Path:
        """Writes the record of the whole run; returns its product, a checkpoint that was checked, or the adapter."""
        product = self.out / stage2.NAME / ADAPTER
        if isinstance(self.config, TrainingConfig):
            product = self._collect(self.config)
        record = {
            "command": self.command(ALL),
            "environment": environment("torch", "numpy"),
            "seconds": round(sum(record["seconds"] for record in records.values())),
            "stages": {name: _without(record, "identity", "stage") for name, record in records.items()},
            "config": dataclasses.asdict(self.config),
        }
        write_json(self.out / RECORD, record)
        return product

    def _collect(self, config: TrainingConfig) -> Path:
        for part, file in PRODUCTS.items():
            write_whole(self.out / WEIGHTS / f"{part}.safetensors", partial(_copy, self.out / file))
        open_checkpoint(config.system, self.out / WEIGHTS)
        return self.out / WEIGHTS

    def _require(self, name: str) -> None:
        if name not in self.steps:
            raise TrainingError(
                f"stage {name} is not of {self.path}, whose networks have the weights of a checkpoint; choose "
                f"{', '.join(self.steps)} or {ALL}."
            )
        if name in ALONE and distributed.world() > 1:
            raise TrainingError(f"stage {name} runs in one process, and this is one of {distributed.world()}; run it "
                                f"without torchrun: {self.command(name)}")  # fmt: skip
        if name == FOLDER and self.config.data.shards:
            raise TrainingError(
                f"stage {FOLDER} draws clips, but key 'data.shards' is {self.config.data.shards!r}; leave the stage "
                "out, or the key."
            )
        for file in self._needs(name):
            if not (self.out / file).is_file():
                maker = next(one for one, step in self.steps.items() if file in step.gives)
                raise TrainingError(
                    f"stage {name} starts from {self.out / file}, which does not exist; make it first: "
                    f"{self.command(maker)}"
                )

    def _needs(self, name: str) -> tuple[str, ...]:
        """The files of the run that a stage starts from; shards replace those of the drawn clips."""
        return tuple(file for file in self.steps[name].needs if not (self.config.data.shards and file in DATA))

    def _identity(self, name: str) -> Facts:
        """Everything that the results of a stage depend on."""
        if isinstance(self.config, AdapterConfig):
            return self._adapter_identity(self.config, name)
        settings, data = dataclasses.asdict(getattr(self.config, name)), self.config.data
        counts = {"train_clips", "validation_clips"}
        own = {key: value for key, value in settings.items() if key not in {*counts, "shards"}}
        seen: Facts = {}
        if DATA[0] in STEPS[name].needs and data.shards:
            seen = {"shards": index_digest(data.shards), "validation_clips": data.validation_clips}
        elif DATA[0] in STEPS[name].needs:
            seen = {key: getattr(data, key) for key in counts}
        return _as_stored(
            {
                "preset": self.config.preset,
                "seed": self.config.seed,
                **{f"{name}.{key}": value for key, value in own.items()},
                **{f"{FOLDER}.{key}": value for key, value in seen.items()},
                **{file: file_sha256(self.out / file) for file in self._needs(name)},
            }
        )

    def _adapter_identity(self, config: AdapterConfig, name: str) -> Facts:
        """The same of adapters. Of the checkpoint's files, which are large, the sizes stand for the content."""
        dit, stage = config.system.dit, dataclasses.asdict(getattr(config, name))
        own = ("seed", "height", "width", "precision")
        facts = {
            **{key: getattr(config, key) for key in own},
            **{f"lora.{key}": value for key, value in dataclasses.asdict(config.lora).items()},
            **{f"{name}.{key}": value for key, value in stage.items()},
            "data.shards": index_digest(config.data.shards),
            "data.validation_clips": config.data.validation_clips,
            **{f"checkpoint.{key}": value for key, value in dataclasses.asdict(dit).items()},
            **{f"checkpoint.{file.name}": file.stat().st_size for file in config.weights().parts["dit"].files},
            **{file: file_sha256(self.out / file) for file in self.steps[name].needs},
        }
        return _as_stored(facts)

    def _record(self, name: str, identity: Facts) -> Facts | None:
        """The record of a finished stage. Raises `CheckpointError` if it has another identity."""
        path = self.out / name / RECORD
        if not path.is_file() or not all((self.out / file).is_file() for file in self.steps[name].gives):
            return None
        try:
            record: Facts = read_json(path)
            made_of, _ = record["identity"], record["seconds"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is no record ({error}); remove it and run the stage again.") from error
        check_identity(str(path.parent), made_of, identity, f"give its own, or remove {path.parent} to make it anew")
        return record

    def _train(self, name: str, identity: Facts) -> Facts:
        settings, folder = getattr(self.config, name), self.out / name
        stage = MAKERS[name](self.config, self.out)
        progress = train(stage, settings, folder, identity, quiet=not distributed.is_main(), kind=self._kind)
        for part, network in stage.outputs().items():
            if isinstance(network, Adapter):
                save_adapter(folder / ADAPTER, network)
                continue
            tensors = merged(network)
            if distributed.is_main():
                save_weights(folder / f"{part}.safetensors", tensors)
        if getattr(settings, "lora", None) is not None:
            save_adapter(folder / ADAPTER, Adapter(cast(CausalDiT, stage.modules["dit"]), GENERATOR))
        final = _numbers(CSVLog(folder / loop.VALIDATION_LOG).rows()[-1])
        facts = {"seconds": round(progress.elapsed_s, 1), "steps": progress.step, "validation": final}
        return self._write(name, identity, facts)

    @property
    def _kind(self) -> type[loop.StageRun]:
        return ShardedRun if isinstance(self.config, AdapterConfig) else loop.StageRun

    def _encode(self, identity: Facts, spent_s: float) -> Facts:
        """Makes the missing clips. Their number does not belong to the identity, so a data set can grow."""
        assert isinstance(self.config, TrainingConfig)
        data, began = self.config.data, time.monotonic()
        try:
            for split, count in ((Split.TRAIN, data.train_clips), (Split.VALIDATION, data.validation_clips)):
                encode_split(self.config, self.out, split, count)
        finally:
            seconds = round(spent_s + time.monotonic() - began, 1)
            facts = {"seconds": seconds, "train_clips": data.train_clips, "validation_clips": data.validation_clips}
            record = self._write(FOLDER, identity, facts)
        return record

    def _write(self, name: str, identity: Facts, facts: Facts) -> Facts:
        record = {"stage": name, **facts, "threads": torch.get_num_threads(), "commit": commit(), "identity": identity}
        if distributed.is_main():
            write_json(self.out / name / RECORD, record)
        distributed.barrier()  # the next stage reads the record and the files beside it
        return record


def _as_stored(facts: Facts) -> Facts:
    """The facts as a file gives them back: lists for tuples."""
    plain: Facts = json.loads(json.dumps(facts))
    return plain


def _copy(source: Path, place: Path) -> None:
    place.write_bytes(source.read_bytes())


def _without(record: Facts, *names: str) -> Facts:
    return {name: value for name, value in record.items() if name not in names}


def _numbers(row: Mapping[str, str]) -> dict[str, float]:
    return {name: float(value) for name, value in row.items() if value and name != "step"}


def commit() -> str | None:
    """The commit of this checkout, with `+` if there are changes since; None outside a checkout."""
    git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    try:
        head, status = git(["git", "rev-parse", "HEAD"]), git(["git", "status", "--porcelain", "-uno"])
    except OSError:
        return None
    return head.stdout.strip() + ("+" if status.stdout else "") if head.returncode == 0 else None


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", "path", type=FILE, required=True, help="TOML file, such as training/configs/tiny.toml.")
@click.option("--stage", type=click.Choice([*STEPS, ALL]), required=True, help="One stage, or all in this order.")
@click.option("--out", type=FILE, required=True, help="The run's folder; a run in it is resumed.")
@click.option("--threads", type=click.IntRange(min=1), help="Number of CPU threads; by default torch's choice.")
def main(path: Path, stage: str, out: Path, threads: int | None) -> None:
    """Train the networks of a preset: the paper's two stages, and the stages before them."""
    with reported("Interrupted; the same command goes on from there."):
        run = TrainingRun(path, load(path), out)
        if threads is not None:
            torch.set_num_threads(threads)
        distributed.join()
        try:
            _execute(run, stage)
        finally:
            distributed.leave()


def _execute(run: TrainingRun, stage: str) -> None:
    names = [name for name in run.steps if name != FOLDER or not run.config.data.shards] if stage == ALL else [stage]
    records = {name: run.do(name) for name in names}
    if not distributed.is_main():
        return
    for name, record in records.items():
        figures = ", ".join(f"{key} {value:g}" for key, value in record.get("validation", {}).items())
        click.echo(f"{name}: done in {record['seconds']:.0f} s{'; ' + figures if figures else ''}.")
    if stage == ALL:
        click.echo(f"Wrote {run.finish(records)}.")


if __name__ == "__main__":
    main()
