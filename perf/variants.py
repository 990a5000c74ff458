"""Artifacts of the same networks under another stream (schedule, sink), exported beside the given ones when needed.

Knows presets and the export; knows no server.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from export.build import export_artifacts
from live_avatar.artifacts import Artifacts, load_artifacts
from live_avatar.checkpoint import open_checkpoint
from live_avatar.errors import ArtifactError, InputError


def variant(artifacts: Path, name: str, **stream: Any) -> Artifacts:
    """The artifacts' preset with other fields of its `StreamConfig`; found in the folder beside it if they are there.

    Raises `InputError` for artifacts whose weights are of files: those are not here to be exported again.
    """
    made = load_artifacts(artifacts)
    if any("files" in origin for origin in made.manifest["weights"].values()):
        raise InputError(f"{artifacts} holds weights of files; give artifacts of random weights (preset tiny).")
    preset, folder = made.preset.with_stream(**stream), artifacts.with_name(f"{artifacts.name}-{name}")
    with suppress(ArtifactError):
        if (found := load_artifacts(folder)).preset == preset:
            return found
    return export_artifacts(open_checkpoint(preset), folder, lambda component: None)
