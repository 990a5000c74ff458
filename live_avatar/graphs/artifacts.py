"""An artifacts folder: graphs, their weights, and the manifest that says what they are.

Written by `live_avatar.exporter`, read by everything that runs graphs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from live_avatar.config import Preset
from live_avatar.errors import ArtifactError, ConfigError
from live_avatar.graphs.contract import Contract
from live_avatar.version import __version__

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
FORMAT = 2


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Artifacts:
    """A folder whose manifest has been read and checked."""

    folder: Path
    preset: Preset
    contracts: Mapping[str, Contract]
    manifest: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """Hash of everything in the folder, short; the name of this exact model in logs and reports."""
        files = json.dumps(self.manifest["files"], sort_keys=True)
        return hashlib.sha256(files.encode()).hexdigest()[:12]

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer's file; none where the preset needs none."""
        return self.folder / TOKENIZER if TOKENIZER in self.manifest["files"] else None

    def graph_path(self, component: str) -> Path:
        if component not in self.contracts:
            raise ArtifactError(
                f"{self.folder} has no component {component!r}; it has {', '.join(sorted(self.contracts))}."
            )
        return self.folder / f"{component}.onnx"

    def verify(self) -> None:
        """Compares the hash of every file. Raises `ArtifactError` for the first that differs."""
        for name, facts in self.manifest["files"].items():
            if file_sha256(self.folder / name) != facts["sha256"]:
                raise ArtifactError(f"{self.folder / name} is not the file of the manifest; export it again.")


def load_artifacts(folder: Path) -> Artifacts:
    """Reads and checks a folder: manifest, format, version, and that every file has its size.

    Raises `ArtifactError` with what to do.
    """
    export_again = f"make it with `live-avatar export --preset tiny --output {folder}`"
    if not folder.is_dir():
        fault = "is not a folder" if folder.exists() else "does not exist"
        raise ArtifactError(f"artifacts folder {folder} {fault}; {export_again}.")
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder} has no {MANIFEST}, so it is not a complete artifacts folder; {export_again}.")
    try:
        manifest = json.loads(path.read_text())
        made_format, made_version = manifest["format"], manifest["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is not a manifest ({error}); {export_again}.") from error
    if (made_format, made_version) != (FORMAT, __version__):
        raise ArtifactError(
            f"{folder} was made by version {made_version} (format {made_format}); this is version {__version__} "
            f"(format {FORMAT}); {export_again}."
        )
    try:
        preset = Preset.from_dict(manifest["preset"])
        contracts = {name: Contract.from_dict(values) for name, values in manifest["contracts"].items()}
        sizes = {name: facts["bytes"] for name, facts in manifest["files"].items()}
    except (ConfigError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} does not describe a preset of this version ({error}); {export_again}.") from error
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            found = f"{file.stat().st_size} bytes" if file.is_file() else "no such file"
            raise ArtifactError(f"{file} should have {size} bytes, but there is {found}; {export_again}.")
    return Artifacts(folder, preset, contracts, manifest)
