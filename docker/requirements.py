"""What both distributions of this repository need from a package index, a line each: `pip install -r` for an image.

`python docker/requirements.py [--without NAME ...] [--extra NAME ...]`. An image installs these before the code is
there, so that a change of the code leaves that layer alone.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CLIENT_EXTRAS = ("c2pa", "media")
"""Extras of the client that the server needs."""


def requirements(root: Path, without: Collection[str] = (), extras: Collection[str] = ()) -> list[str]:
    """Requirements of the server with these extras and of the client with `CLIENT_EXTRAS`, but for `without` and one
    another.

    Raises `ValueError` for a name in `without` that nobody needs, and for an extra that the server does not have.
    """
    server, client = (_project(root / name) for name in ("pyproject.toml", "client/pyproject.toml"))
    offered = server["optional-dependencies"]
    missing = sorted(set(extras) - offered.keys())
    if missing:
        raise ValueError(f"--extra {missing[0]}: there is none; choose {', '.join(sorted(offered))}.")
    chosen = [requirement for extra in extras for requirement in offered[extra]]
    of_client = [requirement for extra in CLIENT_EXTRAS for requirement in client["optional-dependencies"][extra]]
    needed = [*chosen, *server["dependencies"], *client["dependencies"], *of_client]
    unknown = sorted(set(without) - {_name(requirement) for requirement in needed})
    if unknown:
        raise ValueError(f"--without {unknown[0]}: nothing here needs that; leave it out.")
    absent = {server["name"], client["name"], *without}
    return [requirement for requirement in needed if _name(requirement) not in absent]


def _project(path: Path) -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads(path.read_text())["project"]
    return project


def _name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Print what the images install from a package index.")
    parser.add_argument("--without", nargs="*", default=[], help="Requirements to leave out.")
    parser.add_argument("--extra", nargs="*", default=[], help="Extras of live-avatar to add.")
    options = parser.parse_args()
    try:
        sys.stdout.write("\n".join(requirements(ROOT, options.without, options.extra)) + "\n")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
