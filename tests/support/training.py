"""What the tests of training/ share: a configuration as a file, a full disk, the tensors of a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from training.config import TrainingConfig


def toml(config: TrainingConfig) -> str:
    """The configuration as a file."""
    values = dataclasses.asdict(config)
    tables = {name: values.pop(name) for name in list(values) if isinstance(values[name], dict)}
    adapters = tables["stage2"].pop("lora")
    if adapters is not None:
        tables["stage2.lora"] = adapters
    text = "".join(_line(*one) for one in values.items())
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
