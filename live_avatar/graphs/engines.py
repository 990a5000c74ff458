"""The engines of an artifacts folder: where they are, and what each was made of and for.

An engine runs on the library and the GPUs that it was built for, and stands for one graph and its weights. Written by
`live_avatar.exporter.engines`, read by the runtime.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from live_avatar.errors import ArtifactError
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.graphs.digests import file_digests
from live_avatar.graphs.flavours import Flavour, find_flavour
from live_avatar.json_files import read_json

FOLDER = "engines"
RECORDS = "engines.json"


@dataclass(frozen=True)
class Target:
    """What an engine was built for, or a machine that is to run it.

    Plans are not portable to other versions (TensorRT's documentation). gpu: the only GPU that an engine runs on, by
    name; None for one that runs on every GPU of its compute capabilities.
    """

    flavour: str
    version: str
    compute_capabilities: tuple[str, ...]
    gpu: str | None

    def __post_init__(self) -> None:
        find_flavour(self.flavour)

    def __str__(self) -> str:
        library = f"{find_flavour(self.flavour).title} {self.version}"
        capabilities = f"compute capability {', '.join(self.compute_capabilities)}"
        return f"{library} for {capabilities}" if self.gpu is None else f"{library} on {self.gpu} ({capabilities})"

    def serves(self, other: Target) -> bool:
        """Whether an engine for this target is also one for the other."""
        return (
            (self.flavour, self.version) == (other.flavour, other.version)
            and set(other.compute_capabilities) <= set(self.compute_capabilities)
            and self.gpu in (None, other.gpu)
        )


@dataclass(frozen=True)
class Engine:
    """What is known of one engine file.

    files: digests of the graph and of its weights, by file name, as in the manifest; weights_on_host: they stay in
    host memory and are streamed to the GPU in every run; bytes and digest are of the engine's own file.
    """

    target: Target
    files: Mapping[str, str]
    weights_on_host: bool
    build_s: float
    bytes: int
    digest: str

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Engine:
        target = {**values["target"], "compute_capabilities": tuple(values["target"]["compute_capabilities"])}
        return cls(**{**values, "target": Target(**target)})


def engine_path(artifacts: Artifacts, component: str) -> Path:
    return artifacts.folder / FOLDER / f"{component}.plan"


def build_command(artifacts: Artifacts, flavour: Flavour | None = None) -> str:
    """What makes the engines of a folder on this machine."""
    target = "" if flavour is None else f" --target {flavour.name}"
    return f"`python -m export.engines --artifacts {artifacts.folder}{target}`"


def read_engines(artifacts: Artifacts) -> dict[str, Engine]:
    """Records by component; none if no engine was built. Raises `ArtifactError` for records that are damaged."""
    path = artifacts.folder / FOLDER / RECORDS
    if not path.is_file():
        return {}
    try:
        return {name: Engine.from_dict(record) for name, record in read_json(path).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{path} is not a record of engines ({error}); remove the folder and run {build_command(artifacts)}."
        ) from error


def write_engines(artifacts: Artifacts, engines: Mapping[str, Engine]) -> None:
    """Replaces the records as a whole. Raises `OSError`."""
    records = json.dumps({name: asdict(engine) for name, engine in engines.items()}, indent=1)
    write_whole(artifacts.folder / FOLDER / RECORDS, records.encode())


def write_whole(path: Path, data: Any) -> None:
    """Writes bytes whole or not at all. Raises `OSError`, and then leaves nothing behind."""
    with written_whole(path) as file:
        file.write(data)


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that is at `path` if the block ends without an exception; otherwise nothing is left behind."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def flavour_of(artifacts: Artifacts, engines: Mapping[str, Engine]) -> Flavour:
    """The compiler that made the folder's engines. Raises `ArtifactError` if there are none, or of several."""
    folder = artifacts.folder / FOLDER
    names = sorted({engine.target.flavour for engine in engines.values()})
    if not names:
        raise ArtifactError(f"{folder} has no engines; run {build_command(artifacts)} on this machine.")
    if len(names) > 1:
        raise ArtifactError(
            f"{folder} has engines of {' and '.join(names)}, expected those of one; build all with one --target: "
            f"{build_command(artifacts)}."
        )
    return find_flavour(names[0])


def fault(artifacts: Artifacts, component: str, engine: Engine | None, wanted: Target) -> str | None:
    """Why the component's engine is none for that target, as the end of a sentence; None if it is one.

    The engine's file is not read for that: see `altered`.
    """
    path = engine_path(artifacts, component)
    if engine is None or not path.is_file():
        return "has not been built"
    if not engine.target.serves(wanted):
        return f"was built by {engine.target}, but this is {wanted}"
    known = artifacts.manifest["files"]
    for name, digest in engine.files.items():
        if name not in known or known[name]["digest"] != digest:
            return f"was built from another {name}"
    if path.stat().st_size != engine.bytes:
        return f"has {path.stat().st_size} bytes, but {engine.bytes} were written"
    return None


def altered(path: Path, engine: Engine) -> str | None:
    """How the engine's file differs from the one that was built, as the end of a sentence; None if it does not."""
    try:
        (digest,) = file_digests([path]).values()
    except OSError as error:
        return f"cannot be read ({error})"
    if digest != engine.digest:
        return f"has digest {digest[:12]}, expected {str(engine.digest)[:12]}, so it was changed after it was built"
    return None
