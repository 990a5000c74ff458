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
from live_avatar.exporter.tracing import Tracer
from live_avatar.graphs.artifacts import Artifacts, load_artifacts
from live_avatar.graphs.components import build_components
from live_avatar.graphs.contract import contracts
from live_avatar.model.networks import meta_networks
from live_avatar.weights.checkpoint import open_checkpoint


def exported_once(factory: pytest.TempPathFactory, preset: Preset) -> Artifacts:
    """The artifacts of a preset with its own weights; tests must not change them."""
    name = f"{preset.name}-{hashlib.sha256(repr(preset).encode()).hexdigest()[:12]}"

    def export(folder: Path) -> None:
        export_artifacts(open_checkpoint(preset), folder / preset.name, lambda component: None)

    if not _done(factory, name).exists():
        _trace_together(preset)
    return load_artifacts(made_once(factory, name, export) / preset.name)


def _trace_together(preset: Preset) -> None:
    """Workers that need the same artifacts trace them together, each beginning elsewhere, instead of waiting for one.

    The graphs are kept, as `tests.support.traces` has arranged, and the export that follows finds them.
    """
    tracer = Tracer(build_components(preset, meta_networks(preset)))
    agreed = list(contracts(preset).values())
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = worker * len(agreed) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    for contract in agreed[first:] + agreed[:first]:
        tracer.trace(contract)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first caller of this run fills with `make`; other workers wait until it is filled."""
    done = _done(factory, name)
    shared = done.parent
    folder = shared / name
    shared.mkdir(exist_ok=True)
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # what a `make` that failed has left
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


def _done(factory: pytest.TempPathFactory, name: str) -> Path:
    """The file that says that a folder is filled; the folder stands beside it, and all workers have the same."""
    base = factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared" / f"{name}.done"
