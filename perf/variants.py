"""Exports artifacts of the same networks with another stream (schedule, sink) beside the given ones, when needed."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from live_avatar.errors import ArtifactError, InputError
from live_avatar.exporter.build import export_artifacts, provenance
from live_avatar.graphs.artifacts import Artifacts, load_artifacts
from live_avatar.weights.checkpoint import open_checkpoint


def variant(artifacts: Path, name: str, **stream: Any) -> Artifacts:
    """Artifacts with other fields of the `StreamConfig`; reuses the folder beside the given one if it exists.

    Raises `InputError` for artifacts with other weights than the preset's own: those cannot be exported again.
    """
    made = load_artifacts(artifacts)
    own = {part: provenance(weights) for part, weights in open_checkpoint(made.preset).parts.items()}
    if made.manifest["weights"] != own:
        raise InputError(f"{artifacts} holds weights of other files; give artifacts of the preset's own (preset tiny).")
    preset, folder = made.preset.with_stream(**stream), artifacts.with_name(f"{artifacts.name}-{name}")
    with suppress(ArtifactError):
        if (found := load_artifacts(folder)).preset == preset:
            return found
    return export_artifacts(open_checkpoint(preset), folder, lambda component: None)
