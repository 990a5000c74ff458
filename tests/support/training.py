"""What the tests of training/ share: a configuration as a file, a full disk, the tensors of a checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from live_avatar.config import Preset
from training.config import AdapterConfig, TrainingConfig
from training.encoded import EncodedClip
from training.shard_writer import ShardWriter, journals
from training.shards import CLIPS, FORMAT, INDEX, conditions, stored_tensors


def toml(config: TrainingConfig | AdapterConfig) -> str:
    """The configuration as a file."""
    values = dataclasses.asdict(config)
    tables = {name: values.pop(name) for name in list(values) if isinstance(values[name], dict)}
    adapters = tables["stage2"].pop("lora")
    if adapters is not None:
        tables["stage2.lora"] = adapters
    text = "".join(_line(*one) for one in values.items() if one[1] is not None)
    return text + "".join(
        f"[{name}]\n" + "".join(_line(*one) for one in table.items()) for name, table in tables.items()
    )


def _line(key: str, value: Any) -> str:
    return f"{key} = {json.dumps(value)}\n"


def fill_the_disk(path: Path) -> None:
    """What is to be written beside `path` goes to a device that has no room."""
    path.with_name(f".{path.name}.{os.getpid()}").symlink_to("/dev/full")


def flat(state: Any, prefix: str = "") -> Any:
    """Every tensor of a nest of dicts, by its path."""
    if isinstance(state, Tensor):
        yield prefix, state
    elif isinstance(state, dict):
        for name, value in state.items():
            yield from flat(value, f"{prefix}/{name}")


def write_shards(folder: Path, preset: Preset, clips: Mapping[str, Sequence[EncodedClip]], blocks: int) -> None:
    """Shards of encoded clips by split, as `training.prepare` leaves them."""
    writer = ShardWriter(folder / "part-0", shard_bytes=2**30)
    for split, made in clips.items():
        for number, clip in enumerate(made):
            writer.add(f"{split}-{number}", stored_tensors(clip), {"split": split})
    writer.add("silence", {"silence": made[0].silence}, {"split": "none"})
    writer.finish()
    entries = [entry for _, found in journals(folder / "part-0") for entry in found]
    lines = "".join(json.dumps(entry) + "\n" for entry in entries if entry["split"] in clips).encode()
    (folder / CLIPS).write_bytes(lines)
    index = {
        "format": FORMAT,
        "conditions": conditions(preset, blocks),
        "counts": {split: len(made) for split, made in clips.items()},
        "weights": {},
        "silence": entries[-1],
        "shards": [],
        "clips_sha256": hashlib.sha256(lines).hexdigest(),
        "parts": [],
    }
    (folder / INDEX).write_text(json.dumps(index))
