"""Folders of artifacts that a run of the tests makes once, however many workers pytest-xdist has."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from live_avatar.config import Preset
from live_avatar.exporter.build import export_artifacts
from live_avatar.graphs.artifacts import Artifacts, load_artifacts
from live_avatar.weights.checkpoint import open_checkpoint


def exported_once(factory: pytest.TempPathFactory, preset: Preset) -> Artifacts:
    """The artifacts of a preset with its own weights; tests must not change them."""
    key = hashlib.sha256(repr(preset).encode()).hexdigest()[:12]

    def export(folder: Path) -> None:
        export_artifacts(open_checkpoint(preset), folder / preset.name, lambda component: None)

    return load_artifacts(made_once(factory, f"{preset.name}-{key}", export) / preset.name)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first caller of this run fills with `make`; other workers wait until it is filled."""
    base = factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder = shared / name
    shared.mkdir(exist_ok=True)
    done = shared / f"{name}.done"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # what a `make` that failed has left
            folder.mkdir()
            make(folder)
            done.touch()
    return folder
