"""Encodes a folder of videos into shards for the transformer's stages.

`python -m training.prepare --videos DIR --checkpoint DIR --output SHARDS`. It first measures every file and prints a
table of what the filters would drop, then encodes what is left. The same command resumes after any interruption.
`--part I --of N` does every N-th file, for as many machines; the part that ends last writes the index.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import numpy as np
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from live_avatar import interrupts
from live_avatar.arrays import Array
from live_avatar.config import FPS, PRECISIONS, PRESETS, Preset, preset
from live_avatar.environment import environment
from live_avatar.errors import ConfigError, InputError
from live_avatar.graphs.digests import file_digests, file_sha256
from live_avatar.inputs.image import decode_pixels
from live_avatar.weights.checkpoint import load_networks, open_checkpoint
from live_avatar.weights.tensors import Checkpoint
from training import distributed
from training.checkpoints import check_identity, write_json, write_text, write_whole
from training.command import FILE, Number, reported
from training.config import load
from training.encoded import ClipEncoder
from training.errors import TrainingError
from training.shard_writer import ShardWriter, journals
from training.shards import CLIPS, FORMAT, INDEX, Store, conditions, stored_tensors
from training.videos.filters import Filters, Measured, report, table
from training.videos.footage import FootageError, frames_of, open_footage
from training.videos.measures import measure, small_grey
from training.videos.sources import Source, caption_of, list_sources, listing_digest, picture_beside, read_captions

ENCODERS = ("vae", "speech", "text")
PAPER_BLOCKS = 7
"""84 frames, the paper's clips (section 5.1)."""
MEASURED_SIDE = 64
"""Pixels of the shorter side of a frame that is measured."""
ARRAYS = ("JOB_COMPLETION_INDEX", "SLURM_ARRAY_TASK_ID")
"""Variables in which Kubernetes and Slurm tell a job its number."""
FIGURES, PART, DONE, SILENCE, LOCK = "figures.jsonl", "part.json", "done.json", "silence.safetensors", ".lock"
LOG_EVERY_S = 30.0
"""Least time between two lines of progress in a file; on a terminal it is `SHOWN_EVERY_S`."""
SHOWN_EVERY_S = 0.5
PIECE_BYTES = 16 << 20


@dataclass(frozen=True)
class FilmedClip:
    """A clip of a video, in the fields of `training.encoded.Take`."""

    prompt: str
    picture: Array
    speech: Array
    frames: Array


@dataclass(frozen=True)
class Job:
    """One part of a data set. part counts from 0. captions: of every source by name."""

    sources: Sequence[Source]
    captions: Mapping[str, str]
    output: Path
    checkpoint: Checkpoint
    blocks: int
    filters: Filters = field(default_factory=Filters)
    part: int = 0
    of: int = 1
    language: str | None = None
    pictures: bool = False
    shard_bytes: int = 256 << 20
    quiet: bool = False

    @property
    def preset(self) -> Preset:
        return self.checkpoint.preset

    @property
    def folder(self) -> Path:
        return part_folder(self.output, self.part, self.of)

    @property
    def mine(self) -> Sequence[Source]:
        return self.sources[self.part :: self.of]

    @property
    def clip_frames(self) -> int:
        return self.blocks * self.preset.stream.block_frames

    @property
    def measuring(self) -> dict[str, Any]:
        """Everything that the figures depend on."""
        stream = self.preset.stream
        return {
            "videos": listing_digest(self.sources),
            "clip_frames": self.clip_frames,
            "height": stream.height,
            "width": stream.width,
            "language": self.language,
        }

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that the clips depend on, the part's number aside."""
        texts = json.dumps(dict(self.captions), sort_keys=True)
        return {
            **self.measuring,
            "captions": hashlib.sha256(texts.encode()).hexdigest(),
            "filters": dataclasses.asdict(self.filters),
            "pictures": self.pictures,
            "shard_bytes": self.shard_bytes,
            "of": self.of,
            "split": hashlib.sha256("".join(source.split.name for source in self.sources).encode()).hexdigest(),
            "conditions": conditions(self.preset, self.blocks),
            "precision": self.preset.precision,
            "weights": self.weights,
        }

    @cached_property
    def weights(self) -> dict[str, dict[str, str]]:
        """Digests of the encoders' files."""
        return {
            name: {path.name: digest for path, digest in file_digests(self.checkpoint.parts[name].files).items()}
            for name in ENCODERS
        }


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Inside, no other process prepares the same part. Raises `TrainingError` if one does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TrainingError(
                f"{folder} is being written by another process; wait for its end, or give each one a --part of its own."
            ) from error
        yield


def part_folder(output: Path, part: int, of: int) -> Path:
    return output / f"part-{part:05d}-of-{of:05d}"


# --- measuring


def measured(job: Job) -> list[Measured]:
    """Figures of every file of the part. What an earlier process has measured is read from its file."""
    path = job.folder / FIGURES
    job.folder.mkdir(parents=True, exist_ok=True)
    found = _measured_before(path, job.measuring)
    with path.open("a") as file, _bar(len(job.mine), len(found), "measured", "files", job.quiet) as bar:
        for source in job.mine[len(found) :]:
            found.append(_measure(job, source))
            file.write(json.dumps(dataclasses.asdict(found[-1])) + "\n")
            file.flush()
            bar.update()
    return found


def _measured_before(path: Path, identity: Mapping[str, Any]) -> list[Measured]:
    """The files that are measured; the first line of the file says of what. A line that was cut off is dropped."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    try:
        values = [json.loads(line) for line in lines]
        found = [Measured(**value) for value in values[1:]]
    except (ValueError, TypeError) as error:
        raise TrainingError(f"{path} is damaged ({error}); remove it, and the files are measured again.") from error
    if not values:
        write_text(path, json.dumps(identity) + "\n")
        return []
    again = f"give the same, or remove {path.parent} to measure and encode anew"
    check_identity(str(path.parent), values[0], json.loads(json.dumps(identity)), again)
    write_text(path, "".join(json.dumps(value) + "\n" for value in values))
    return found


def _measure(job: Job, source: Source) -> Measured:
    try:
        footage = open_footage(source.path, job.language)
        stream = job.preset.stream
        scale = MEASURED_SIDE / min(stream.height, stream.width)
        frames = _checked(frames_of(footage, round(stream.height * scale), round(stream.width * scale)))
        clips = []
        for speech in _spoken(footage.speech, footage.frames // job.clip_frames, job):
            grey = np.stack([small_grey(next(frames)) for _ in range(job.clip_frames)])
            clips.append(measure(grey, speech).to_dict())
        return Measured(source.name, round(footage.seconds, 3), footage.track, clips)
    except (FootageError, StopIteration) as error:
        interrupts.check()  # PyAV reports an interruption as an error of the file
        return Measured(source.name, fault=str(error) or f"{source.path} ends before its time; make the file again.")


def _spoken(speech: Array, clips: int, job: Job) -> list[Array]:
    samples = job.blocks * job.preset.stream.block_samples
    return list(speech[: clips * samples].reshape(clips, samples))


def _checked(frames: Iterator[Array]) -> Iterator[Array]:
    """The frames, ended by a signal between two of them."""
    for frame in frames:
        interrupts.check()
        yield frame


# --- encoding


def encode(job: Job, files: Sequence[Measured]) -> None:
    """Encodes the clips that pass the filters into the part's shards, or those that are missing there."""
    path = job.folder / PART
    if path.is_file():
        again = f"give the same, or remove {job.folder} to encode anew"
        check_identity(str(job.folder), _read(path), json.loads(json.dumps(job.identity)), again)
    write_json(path, job.identity)
    writer = ShardWriter(job.folder, job.shard_bytes)
    kept = {one.name: one.kept(job.filters) for one in files}
    total = sum(map(len, kept.values()))
    missing = [source for source in job.mine if any(_key(source, clip) not in writer for clip in kept[source.name])]
    if missing:
        encoder = _encoder(job.checkpoint)
        silence = encoder.silence(job.blocks)
        _write_tensors(job.folder / SILENCE, {"silence": silence})
        figures = {one.name: one.clips for one in files}
        with _bar(total, len(writer), "encoded", "clips", job.quiet) as bar:
            for source in missing:
                wanted = [clip for clip in kept[source.name] if _key(source, clip) not in writer]
                for clip, filmed in _filmed(job, source, wanted):
                    tensors = stored_tensors(encoder.encode(filmed, silence))
                    _check_finite(source, tensors)
                    writer.add(_key(source, clip), tensors, _facts(job, source, clip, figures[source.name][clip]))
                    bar.update()
                    interrupts.check()
    writer.finish()


def _encoder(checkpoint: Checkpoint) -> ClipEncoder:
    """The encoders without the transformer, which is 14 times as large as they are together."""
    networks = load_networks(checkpoint, only=ENCODERS)
    return ClipEncoder(checkpoint.preset, networks, checkpoint.tokenizer, distributed.device())


def _key(source: Source, clip: int) -> str:
    return f"{source.number:08d}-{clip:05d}"


def _facts(job: Job, source: Source, clip: int, figures: Mapping[str, float]) -> dict[str, Any]:
    start_s = clip * job.clip_frames / FPS
    caption = job.captions[source.name]
    return {
        "split": source.split.name.lower(),
        "source": source.name,
        "start_s": round(start_s, 2),
        "caption": caption,
        "figures": dict(figures),
    }


def _filmed(job: Job, source: Source, wanted: Sequence[int]) -> Iterator[tuple[int, FilmedClip]]:
    """The wanted clips of a file, in order. Raises `TrainingError` if the file was changed since it was measured."""
    stream = job.preset.stream
    still = _picture(job, source)
    try:
        footage = open_footage(source.path, job.language)
        frames = _checked(frames_of(footage, stream.height, stream.width))
        for clip, speech in enumerate(_spoken(footage.speech, max(wanted) + 1, job)):
            shown = [next(frames) for _ in range(job.clip_frames)]
            if clip in wanted:
                video = np.stack(shown)
                picture = video[0] if still is None else still
                yield clip, FilmedClip(job.captions[source.name], picture, speech, video)
    except (FootageError, ValueError, RuntimeError) as error:  # a generator that ends too early is a RuntimeError
        interrupts.check()
        raise TrainingError(
            f"{source.path} was measured, and cannot be read now ({error}); put the file back, or remove {job.folder}."
        ) from error


def _picture(job: Job, source: Source) -> Array | None:
    if not job.pictures:
        return None
    path, stream = picture_beside(source), job.preset.stream
    if path is None:
        raise InputError(
            f"{source.path} has no picture beside it, such as {source.path.with_suffix('.png').name}; add it, or leave "
            "--pictures out."
        )
    return np.array(decode_pixels(path.read_bytes(), stream.height, stream.width))


def _check_finite(source: Source, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise TrainingError(
                f"{name} of {source.path} has a value that float16 does not have; check the checkpoint's files with "
                "live-avatar generate."
            )


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    data = save(dict(tensors))

    def write(place: Path) -> None:
        place.write_bytes(data)

    write_whole(path, write)


# --- the index


def finish(job: Job, found: Mapping[str, Any]) -> bool:
    """Writes the record of the part; if it is the last one, also the index. Returns whether it has."""
    shards = []
    for shard, entries in journals(job.folder):
        name = f"{job.folder.name}/{shard.name}"
        facts = {"bytes": shard.stat().st_size, "sha256": file_sha256(shard), "clips": len(entries)}
        shards.append({"file": name, **facts})
    write_json(
        job.folder / DONE,
        {"shards": shards, "report": dict(found), "environment": environment("av", "numpy", "torch")},
    )
    return merge(job)


def merge(job: Job) -> bool:
    """Writes the index of all parts, if all are done. Raises `CheckpointError` for parts that do not belong together.

    Its clips stand in the order of their files' names, so the order is the same for any number of parts.
    """
    folders = [part_folder(job.output, part, job.of) for part in range(job.of)]
    if not all((folder / DONE).is_file() for folder in folders):
        return False
    ours = json.loads(json.dumps(job.identity))
    for folder in folders:
        check_identity(str(folder), _read(folder / PART), ours, f"remove {folder} and run that part again")
    entries = [entry for folder in folders for _, clips in journals(folder) for entry in clips]
    entries.sort(key=lambda entry: str(entry["key"]))
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    silent = next((folder / SILENCE for folder in folders if (folder / SILENCE).is_file()), None)
    if silent is None:
        raise TrainingError(f"{job.output} has no clip: the filters drop all; see the table, and give wider bounds.")
    write_text(job.output / CLIPS, lines)
    done = [_read(folder / DONE) for folder in folders]
    splits = [entry["split"] for entry in entries]
    write_json(
        job.output / INDEX,
        {
            "format": FORMAT,
            "conditions": conditions(job.preset, job.blocks),
            "counts": {split: splits.count(split) for split in sorted(set(splits))},
            "weights": job.weights,
            "silence": _whole_file(silent, job.output),
            "shards": [shard for part in done for shard in part["shards"]],
            "clips_sha256": hashlib.sha256(lines.encode()).hexdigest(),
            "parts": [{"identity": ours, **_without(part, "shards")} for part in done],
        },
    )
    return True


def _whole_file(path: Path, output: Path) -> dict[str, Any]:
    """A file as an entry."""
    data = path.read_bytes()
    return {
        "key": path.stem,
        "file": path.relative_to(output).as_posix(),
        "offset": 0,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _read(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
        return values
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path} is damaged ({error}); remove {path.parent} and run that part again.") from error


def verify(url: str) -> tuple[int, int]:
    """Reads every byte of the shards of a folder or URL; returns the numbers of shards and clips.

    Raises `CheckpointError` that names the first damaged clip or file.
    """
    store = Store(url)
    index = store.index()
    entries = store.clips(index)
    store.tensors(index.silence)
    for shard in index.shards:
        digest = hashlib.sha256()
        for start in range(0, shard["bytes"] + 1, PIECE_BYTES):
            digest.update(store.read(shard["file"], start, start + PIECE_BYTES))
        if digest.hexdigest() == shard["sha256"]:
            continue
        for entry in entries:
            if entry["file"] == shard["file"]:
                store.tensors(entry)
        raise TrainingError(
            f"{url}/{shard['file']} is damaged outside its clips, which are whole; copy that file again if others "
            "read it as a tar file."
        )
    return len(index.shards), len(entries)


def _bar(total: int, initial: int, name: str, unit: str, quiet: bool) -> Any:
    """Progress on standard error with rate and time left."""
    every_s = SHOWN_EVERY_S if sys.stderr.isatty() else LOG_EVERY_S
    return tqdm(total=total, initial=initial, desc=name, unit=unit, mininterval=every_s, disable=quiet)


# --- the command


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--videos", type=FILE, help="Folder of videos, with folders in it; any files that FFmpeg reads.")
@click.option("--output", required=True, help="Folder for the shards. With --verify also a URL that fsspec opens.")
@click.option("--checkpoint", "weights", type=FILE, help="Folder of the networks; default: the package's own.")
@click.option("--config", type=FILE, help="TOML file of the training: its preset, size and data.blocks.")
@click.option("--preset", "name", type=click.Choice(sorted(PRESETS)), help="Instead of --config or the checkpoint's.")
@click.option("--width", type=click.IntRange(16), help="Width of the clips, a multiple of 16; default: the preset's.")
@click.option("--height", type=click.IntRange(16), help="Height of the clips, a multiple of 16.")
@click.option("--precision", type=click.Choice(PRECISIONS), help="Type of the encoders; default: the preset's.")
@click.option("--blocks", type=click.IntRange(1), help=f"Blocks of 12 frames in a clip; default: {PAPER_BLOCKS}.")
@click.option("--prompt", help="Caption of every file that --captions does not name.")
@click.option("--captions", "caption_file", type=FILE, help="JSON object of captions by a file's path in --videos.")
@click.option("--pictures", is_flag=True, help="The reference is NAME.png (or .jpg, .webp) beside NAME.mp4, not the "
              "clip's first frame.")  # fmt: skip
@click.option("--language", help="Take the sound track of this language, such as eng; default: the file's own default "
              "track, or else its first.")  # fmt: skip
@click.option("--validation-share", type=Number(0, 0.5), default=0.02, show_default=True,
              help="Share of the files, not of clips, for validation.")  # fmt: skip
@click.option("--min-seconds", type=Number(0), default=10.0, show_default=True,
              help="Files must be longer, as in the paper.")  # fmt: skip
@click.option("--min-speech", type=Number(0, 1), help="Least share of a clip's frames with sound.")
@click.option("--max-cut", type=Number(0), help="Largest mean change between two frames, levels of 255.")
@click.option("--max-still", type=Number(0, 1), help="Largest share of frames that equal the one before.")
@click.option("--min-sync", type=Number(-1, 1), help="Least correlation of moving parts with the loudness.")
@click.option("--part", type=click.IntRange(0), default=0, show_default=True, envvar=ARRAYS,
              help=f"Number of this part, from 0; by default that of the job, {' or '.join(ARRAYS)}.")  # fmt: skip
@click.option("--of", type=click.IntRange(1), default=1, show_default=True, help="Number of parts.")
@click.option("--shard-mib", type=click.IntRange(1), default=256, show_default=True, help="Size of a shard, about.")
@click.option("--dry-run", is_flag=True, help="Measure, print the table, and stop.")
@click.option("--report", "report_file", type=FILE, help="Write the table's figures to this JSON file.")
@click.option("--verify", "verifies", is_flag=True, help="Only read all shards of --output and compare the digests.")
def main(verifies: bool, output: str, dry_run: bool, report_file: Path | None, **options: Any) -> None:
    """Encode a folder of videos into shards for training."""
    with reported("Interrupted; the same command goes on from there."):
        if verifies:
            shards, clips = verify(output)
            click.echo(f"{output}: {shards} shards with {clips} clips are whole.")
            return
        job = make_job(output=Path(output), **options)
        with interrupts.deferred(), _alone(job.folder):
            files = measured(job)
            found = report(files, job.filters, job.blocks, job.preset.stream.block_frames)
            click.echo(table(found, job.filters))
            if report_file is not None:
                write_json(report_file, {"filters": dataclasses.asdict(job.filters), **found})
            if dry_run:
                return
            encode(job, files)
            whole = finish(job, found)
        click.echo(_ending(job, whole))


def _ending(job: Job, whole: bool) -> str:
    if whole:
        return f"Wrote {job.output / INDEX}; train with the key shards = {str(job.output)!r} in [data]."
    lacking = sum(not (part_folder(job.output, part, job.of) / DONE).is_file() for part in range(job.of))
    return f"Part {job.part} is done; {lacking} of {job.of} parts are not. The last one writes the index."


def make_job(
    output: Path,
    videos: Path | None,
    weights: Path | None,
    config: Path | None,
    name: str | None,
    width: int | None,
    height: int | None,
    precision: str | None,
    blocks: int | None,
    prompt: str | None,
    caption_file: Path | None,
    pictures: bool,
    language: str | None,
    validation_share: float,
    part: int,
    of: int,
    shard_mib: int,
    **bounds: float | None,
) -> Job:
    """The job of the command's options. Raises `LiveAvatarError` for those that cannot be."""
    if videos is None:
        raise ConfigError("--videos is missing; give the folder that holds the videos.")
    if output.resolve().is_relative_to(videos.resolve()):
        raise ConfigError(f"--output {output} lies in --videos {videos}; give a folder outside.")
    if part >= of:
        raise ConfigError(
            f"--part is {part}, expected 0 to {of - 1}: parts count from 0; mend it, or --of. Without --part it comes "
            f"from {' or '.join(ARRAYS)}."
        )
    system, config_blocks = _system(config, name)
    checkpoint = open_checkpoint(system, weights)
    stream = checkpoint.preset.stream
    sized = checkpoint.preset.with_stream(width=width or stream.width, height=height or stream.height)
    checkpoint = dataclasses.replace(checkpoint, preset=sized.with_precision(precision or sized.precision))
    sources = list_sources(videos, validation_share)
    captions = read_captions(caption_file) if caption_file is not None else {}
    return Job(
        sources=sources,
        captions=caption_of(sources, captions, prompt),
        output=output,
        checkpoint=checkpoint,
        blocks=blocks or config_blocks,
        filters=Filters(**bounds),
        part=part,
        of=of,
        language=language,
        pictures=pictures,
        shard_bytes=shard_mib << 20,
    )


def _system(config: Path | None, name: str | None) -> tuple[Preset | None, int]:
    """The preset, or None for the checkpoint's, and the blocks of a clip."""
    if config is not None and name is not None:
        raise ConfigError(f"--config and --preset {name} are both given; the preset stands in the file, so leave "
                          "--preset out.")  # fmt: skip
    if config is not None:
        settings = load(config)
        return settings.system, settings.data.blocks
    return (None if name is None else preset(name)), PAPER_BLOCKS


if __name__ == "__main__":
    main()
