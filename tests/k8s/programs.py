"""The programs that the tests of k8s/ run: those of .venv and of .k8s, and Debian's, with the package of each."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Collection
from pathlib import Path

import pytest

PACKAGES = {
    "bwrap": "bubblewrap",
    "haproxy": "haproxy",
    "nginx": "nginx-light",
    "openssl": "openssl",
    "prometheus": "prometheus",
    "promtool": "prometheus",
}
"""Debian's package for each program."""
ROOT = Path(__file__).parents[2]
CHECKOV = ROOT / ".k8s" / "bin" / "checkov"
SYSTEM = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # a user's PATH may lack the sbin


def missing(path: str = SYSTEM, names: Collection[str] = tuple(PACKAGES)) -> str:
    """The sentence that says what to install, for those of the programs that are not there; empty if all are."""
    absent = [name for name in names if shutil.which(name, path=path) is None]
    if not absent:
        return ""
    packages = " ".join(sorted({PACKAGES[name] for name in absent}))
    are = "is" if len(absent) == 1 else "are"
    install = f"apt-get install --no-install-recommends {packages}"
    return f"{', '.join(absent)} {are} not installed; run `{install}` as root, and again."


def program(name: str, path: str = SYSTEM) -> str:
    """Path of one of Debian's programs. Fails with the command that installs it."""
    found = shutil.which(name, path=path)
    if found is None:
        pytest.fail(missing(path, [name]))
    return found


def tool(name: str) -> str:
    """Path of a program of .venv. Fails with what installs it."""
    return _installed(Path(sys.executable).with_name(name), "make install")


def checkov() -> str:
    """Its path in a virtual environment of its own, as it pins much that .venv has newer."""
    return _installed(CHECKOV, "make test-k8s")


def _installed(path: Path, command: str) -> str:
    if not path.is_file():
        pytest.fail(f"there is no {path}; run `{command}`.")
    return str(path)
