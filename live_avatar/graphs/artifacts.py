"""An artifacts folder: graphs, their weights, and the manifest that says what they are.

Written by `live_avatar.exporter`, read by everything that runs graphs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from live_avatar.arrays import Array
from live_avatar.config import Preset
from live_avatar.errors import ArtifactError, ConfigError
from live_avatar.graphs.contract import Contract
from live_avatar.graphs.digests import file_digests
from live_avatar.json_files import read_json
from live_avatar.version import __version__

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
MODULATION = "dit.modulation.safetensors"
"""`modulation` [steps + 1, layers, 6, C] and `head_modulation` [steps + 1, 2, C]: of timestep 0, then of every step."""
FORMAT = 7


def weight_file(component: str) -> str:
    """External file of a component; components of one network share theirs."""
    group = "dit" if component.startswith("dit") else "vae" if component.startswith("vae_") else component
    return f"{group}.weights"


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
    def manifest_sha256(self) -> str:
        """Hash of the whole manifest: preset, contracts and the digests of all files."""
        return hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()

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

    def modulation(self, step: int) -> dict[str, Array]:
        """Modulation of a step counted from 1, or of timestep 0, by the names of the transformer's inputs."""
        with self.verified([MODULATION]), safe_open(self.folder / MODULATION, "np") as file:
            return {name: file.get_slice(name)[step] for name in file.keys()}  # noqa: SIM118 - not a mapping

    @contextmanager
    def reading(self, component: str) -> Iterator[Path]:
        """Gives the path of a component's graph, whose files are verified before and after they are read inside."""
        path = self.graph_path(component)
        with self.verified([path.name, weight_file(component)]):
            yield path

    @contextmanager
    def verified(self, names: Iterable[str]) -> Iterator[None]:
        """Verifies files before what runs inside, and again afterwards if they were changed meanwhile."""
        names = list(names)
        self.verify(names)
        yield
        self.verify(names)

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Compares digests with those of the manifest, of all files or of those named.

        Raises `ArtifactError` for the first file that differs or is not in the manifest.
        """
        files = self.manifest["files"]
        chosen = list(files if names is None else names)
        for name in chosen:
            if name not in files:
                raise ArtifactError(f"{self.folder / MANIFEST} does not list {name}; export the artifacts again.")
        try:
            found = file_digests(self.folder / name for name in chosen)
        except OSError as error:
            raise ArtifactError(f"artifacts in {self.folder} cannot be read ({error}); export them again.") from error
        for name, (path, digest) in zip(chosen, found.items(), strict=True):
            if digest != files[name]["digest"]:
                raise ArtifactError(
                    f"{path} has digest {digest[:12]}, expected {files[name]['digest'][:12]} as in {MANIFEST}, so it "
                    "was changed after the export; export the artifacts again."
                )


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
        manifest = read_json(path)
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
        if not all(isinstance(facts["digest"], str) for facts in manifest["files"].values()):
            raise TypeError("a digest is not a string")
    except (ConfigError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} does not describe a preset of this version ({error}); {export_again}.") from error
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            found = f"{file.stat().st_size} bytes" if file.is_file() else "no such file"
            raise ArtifactError(f"{file} should have {size} bytes, but there is {found}; {export_again}.")
    return Artifacts(folder, preset, contracts, manifest)
