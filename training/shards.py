"""Encoded clips in shards: tar files of safetensors with an index, on a local disk or any path that fsspec opens.

The index has the place of every clip, so any clip is read by its number with one request, and the clip of any step
follows from the step's number alone: training goes on at the exact clip, on any number of processes. (Loaders such as
webdataset shuffle in a buffer, whose state belongs to one number of processes.) `training.prepare` writes shards.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from live_avatar.config import LATENT_CHANNELS, MOTION_LATENTS, Preset
from live_avatar.errors import CheckpointError
from training.checkpoints import check_identity
from training.config import TrainingConfig
from training.data.split import Split
from training.encoded import STORED, EncodedClip, EncodedClips
from training.errors import TrainingError
from training.loop import generator

FORMAT = 1
INDEX, CLIPS = "index.json", "clips.jsonl"
MAKE = "make it with python -m training.prepare"


def conditions(preset: Preset, blocks: int) -> dict[str, Any]:
    """What shards and a preset must agree in, so that the clips are what its streams are conditioned on."""
    stream, dit = preset.stream, preset.dit
    grid = [stream.latent_height, stream.latent_width]
    return {
        "blocks": blocks,
        "frames_per_block": stream.frames_per_block,
        "decoder_warmup_latents": stream.decoder_warmup_latents,
        "speech_window_blocks": stream.speech_window_blocks,
        "lookahead_ms": stream.lookahead_ms,
        "latents": [1, LATENT_CHANNELS, blocks * stream.frames_per_block, *grid],
        "motion": [1, LATENT_CHANNELS, MOTION_LATENTS, *grid],
        "states": [blocks, dit.audio_states, dit.audio_dim, stream.block_frames],
        "text": [dit.text_len, dit.text_dim],
    }


def stored_tensors(clip: EncodedClip) -> dict[str, Tensor]:
    """What a shard keeps of a clip: float16 (error 5e-4 at size 1), and of the text the rows that are not padding."""
    kept = {name: getattr(clip, name).half().contiguous() for name in STORED}
    rows = int(clip.text.abs().amax(1).nonzero().max()) + 1 if clip.text.any() else 1
    return {**kept, "text": kept["text"][:rows].contiguous()}


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=generator(seed, "shards", epoch))


@dataclass(frozen=True)
class Index:
    """The contents of `index.json`. counts: clips by split; weights: digests of the encoders' files."""

    conditions: Mapping[str, Any]
    counts: Mapping[str, int]
    weights: Mapping[str, Any]
    silence: Mapping[str, Any]
    shards: list[dict[str, Any]]
    clips_sha256: str
    parts: list[dict[str, Any]]


class Store:
    """A folder of shards, through fsspec. Raises `TrainingError` for what cannot be opened."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise TrainingError(
                f"shards {url} cannot be opened ({error}); give a folder, or a URL whose protocol fsspec knows."
            ) from error

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Bytes of a file, from `start` up to `end`."""
        place = posixpath.join(self._root, name)
        try:
            data: bytes = self._files.cat_file(place, start=start, end=end)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise TrainingError(f"{self.url}/{name} cannot be read ({reason}); copy it there, or {MAKE}.") from error
        return data

    def index(self) -> Index:
        """The index. Raises `CheckpointError` if it is damaged or of another format."""
        try:
            values = json.loads(self.read(INDEX))
            found, index = values.pop("format"), Index(**values)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise CheckpointError(f"{self.url}/{INDEX} is no index of shards ({error}); {MAKE}.") from error
        if found != FORMAT:
            raise CheckpointError(f"{self.url}/{INDEX} has format {found}, expected {FORMAT}; {MAKE}.")
        return index

    def clips(self, index: Index) -> list[dict[str, Any]]:
        """A description of every clip. Raises `CheckpointError` if the file is not the one of the index."""
        data = self.read(CLIPS)
        if hashlib.sha256(data).hexdigest() != index.clips_sha256:
            raise CheckpointError(
                f"{self.url}/{CLIPS} is not the file that {INDEX} describes; copy both again, or {MAKE}."
            )
        return [json.loads(line) for line in data.splitlines()]

    def tensors(self, entry: Mapping[str, Any]) -> dict[str, Tensor]:
        """Tensors of an entry with file, offset, bytes and sha256. Raises `CheckpointError` if they were changed."""
        start = entry["offset"]
        data = self.read(entry["file"], start, start + entry["bytes"])
        if len(data) != entry["bytes"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise CheckpointError(
                f"{self.url}/{entry['file']} is damaged in {entry['key']}, bytes {start} to {start + entry['bytes']}; "
                f"copy that file again, or remove it and {MAKE}."
            )
        try:
            return load(data)
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.url}/{entry['file']}: {entry['key']} is no clip ({error}); {MAKE}."
            ) from error


class ShardedClips:
    """The clips of a split in the shards of `url`, by number; `most` takes the first ones only. `seed` shuffles them.

    Raises `CheckpointError` for shards that were made for a preset of other shapes, with the key that differs, and
    `TrainingError` for a split without clips.
    """

    def __init__(
        self, url: str, split: Split, preset: Preset, blocks: int, most: int | None = None, seed: int = 0
    ) -> None:
        self._seed = seed
        self._store = Store(url)
        index = self._store.index()
        remedy = "give the preset, size and data.blocks that the shards were made with, or make others"
        check_identity(url, dict(index.conditions), conditions(preset, blocks), remedy)
        name = split.name.lower()
        entries = [entry for entry in self._store.clips(index) if entry["split"] == name][:most]
        if not entries:
            raise TrainingError(f"{url} has no clip of the {name} split; make shards of more files.")
        files = sorted({entry["file"] for entry in entries})
        numbers = {file: number for number, file in enumerate(files)}
        self._files = files
        self._places = np.array([(numbers[one["file"]], one["offset"], one["bytes"]) for one in entries], np.int64)
        self._digests = np.array([list(bytes.fromhex(one["sha256"])) for one in entries], np.uint8)
        self._shapes = {key: tuple(shape) for key, shape in index.conditions.items() if isinstance(shape, list)}
        self._silence = self._store.tensors(index.silence)["silence"]

    def __len__(self) -> int:
        return len(self._places)

    def at(self, position: int) -> int:
        """The clip at a position, from 0, of an endless order: every pass over all clips has its own shuffle."""
        epoch, place = divmod(position, len(self))
        return int(_order(len(self), self._seed, epoch)[place])

    def __getitem__(self, index: int) -> EncodedClip:
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index} is outside 0..{len(self) - 1}.")
        file, offset, size = self._places[index].tolist()
        entry = {
            "file": self._files[file],
            "offset": offset,
            "bytes": size,
            "sha256": self._digests[index].tobytes().hex(),
            "key": f"clip {index}",
        }
        stored = {name: tensor.float() for name, tensor in self._store.tensors(entry).items()}
        stored["text"] = F.pad(stored["text"], (0, 0, 0, self._shapes["text"][0] - len(stored["text"])))
        for name in STORED:
            if tuple(stored[name].shape) != self._shapes[name]:
                raise CheckpointError(
                    f"{self._store.url}/{entry['file']}: {name} of clip {index} is {list(stored[name].shape)}, "
                    f"expected {list(self._shapes[name])}; {MAKE}."
                )
        return EncodedClip(reference=stored["motion"][:, :, :1], silence=self._silence, **stored)


def index_digest(url: str) -> str:
    """A digest of the index, which has the digests of all that belongs to it. Raises `TrainingError`."""
    return hashlib.sha256(Store(url).read(INDEX)).hexdigest()


def open_clips(config: TrainingConfig, out: Path, split: Split) -> EncodedClips | ShardedClips:
    """The clips of the training or validation split of a run: those of `data.shards`, or the drawn ones in `out`.

    Errors as `ShardedClips` and `EncodedClips`.
    """
    data, trains = config.data, split is Split.TRAIN
    if data.shards:
        most = None if trains else data.validation_clips
        return ShardedClips(data.shards, split, config.system, data.blocks, most, config.seed)
    return EncodedClips(out, split, data.train_clips if trains else data.validation_clips)
