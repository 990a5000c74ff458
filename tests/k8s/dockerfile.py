"""Dockerfiles, as far as ours go: their instructions, what .dockerignore leaves of a checkout, a build without Docker.

The build runs on this machine's own files in the place of the base image, so it shows what the instructions do, and not
what the base image holds. It writes to a folder that stands for /opt, below which all that ours write must lie. Needs
bubblewrap.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tests.k8s.programs import ROOT
from tests.k8s.sandbox import Container, run

OPT = PurePosixPath("/opt")
KNOWN = {"FROM", "ARG", "WORKDIR", "ENV", "COPY", "RUN", "USER", "EXPOSE", "ENTRYPOINT", "CMD"}
BUILD_LIMIT_S = 900.0


@dataclass(frozen=True)
class Instruction:
    name: str
    argument: str


def instructions(path: Path) -> list[Instruction]:
    """Raises `ValueError` for one that is not known here."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    found = []
    for line in re.sub(r"\\\n", "", "\n".join(lines)).splitlines():
        if line.strip():
            name, _, argument = line.partition(" ")
            if name not in KNOWN:
                raise ValueError(f"{path}: {name} is not one of {', '.join(sorted(KNOWN))}.")
            found.append(Instruction(name, argument.strip()))
    return found


def arguments_of(path: Path, name: str) -> list[str]:
    return [found.argument for found in instructions(path) if found.name == name]


# .dockerignore


def context(root: Path) -> Iterator[Path]:
    """The files of a checkout that a build gets to see, relative to it."""
    rules = rules_of(root)
    wanted = {pattern.split("/")[0] for is_kept, pattern in rules if is_kept}
    for top in sorted(root.iterdir()):
        if top.name in wanted:  # all else is left out by the first rule, and may be large
            for path in sorted([top, *top.rglob("*")]):
                if path.is_file() and not is_ignored(path.relative_to(root).as_posix(), rules):
                    yield path.relative_to(root)


def is_ignored(path: str, rules: list[tuple[bool, str]]) -> bool:
    """The last rule that fits the path, or a folder that it is in, decides."""
    ignored = False
    places = [path, *(str(parent) for parent in PurePosixPath(path).parents)][:-1]
    for is_kept, pattern in rules:
        if any(_expression(pattern).fullmatch(place) for place in places):
            ignored = not is_kept
    return ignored


def rules_of(root: Path) -> list[tuple[bool, str]]:
    """Of each line of .dockerignore, whether it is an exception, and its pattern."""
    lines = (line.strip() for line in (root / ".dockerignore").read_text().splitlines())
    return [(line.startswith("!"), line.removeprefix("!")) for line in lines if line and not line.startswith("#")]


def _expression(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*"))


# The build


@dataclass
class Image:
    """`opt` is what stands for /opt; the rest is what a container of the image starts with."""

    opt: Path
    environment: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    user: str = "0:0"
    entrypoint: list[str] = field(default_factory=list)

    def place(self, path: str) -> Path:
        """Where a path below /opt is on this machine."""
        return self.opt / PurePosixPath(path).relative_to(OPT)


def build(path: Path, opt: Path, build_arguments: Mapping[str, str | None]) -> Image:
    """Does what a Dockerfile says. An argument of None is not set, as if its line had no default.

    Raises `ContainerError` for a command that fails.
    """
    image, given = Image(opt), {}
    for found in instructions(path):
        match found.name:
            case "ARG":
                name, _, default = found.argument.partition("=")
                value = build_arguments.get(name, default or None)
                given |= {} if value is None else {name: value}
            case "ENV":
                pairs = (word.partition("=") for word in shlex.split(found.argument))
                image.environment |= {name: _filled(value, image.environment) for name, _, value in pairs}
            case "WORKDIR":
                image.folder = found.argument
                image.place(image.folder).mkdir(parents=True, exist_ok=True)
            case "COPY":
                _copy(found.argument, image)
            case "RUN":
                _run(found.argument, image, given)
            case "USER":
                image.user = found.argument
            case "ENTRYPOINT":
                image.entrypoint = json.loads(found.argument)
    return image


def _filled(value: str, environment: Mapping[str, str]) -> str:
    """PATH alone comes from the base image, here from this machine."""
    return value.replace("$PATH", environment.get("PATH", Container.PATH))


def _copy(argument: str, image: Image) -> None:
    *sources, target = argument.split()
    folder = image.place(str(PurePosixPath(image.folder) / target))
    for file in context(ROOT):
        for source in sources:
            if source == ".":
                place = folder / file
            elif file.as_posix() == source:
                place = folder / file.name
            else:
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, place)


def _run(command: str, image: Image, given: Mapping[str, str]) -> None:
    container = Container(
        command=["/bin/sh", "-c", command],
        environment={**image.environment, **given},
        folder=image.folder,
        opt=image.opt,
        opt_is_writable=True,
        shares_network=True,
    )
    run(container, BUILD_LIMIT_S)
