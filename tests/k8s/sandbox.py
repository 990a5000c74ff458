"""Containers without a container runtime: bubblewrap gives a process the file system, user and rights of one.

The root file system is this machine's programs and libraries, read-only, and whatever is mounted; there is no home and
no /tmp but those. Seccomp and control groups (limits of memory and CPU) are not there. Needs root.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from tests.k8s.programs import program

TOPS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32", "usr", "etc", "sys")
"""Folders of this machine that a container sees."""


@dataclass(frozen=True)
class Mount:
    """`source` is a folder of this machine; without one it is memory, of `bytes` at most."""

    path: str
    source: Path | None
    is_read_only: bool = False
    bytes: int = 0


SHARED_MEMORY = Mount("/dev/shm", None, bytes=64 << 20)
"""What every container runtime gives a container, unless something else is mounted there."""


@dataclass(frozen=True)
class Container:
    """`opt` is what it has at /opt. With `user` it has no rights of root, and can get none."""

    PATH: ClassVar[str] = f"{Path(sys.base_prefix) / 'bin'}:/usr/local/bin:/usr/bin:/bin"

    command: Sequence[str]
    environment: Mapping[str, str]
    folder: str
    opt: Path
    opt_is_writable: bool = False
    shares_network: bool = False
    mounts: Sequence[Mount] = ()
    user: int | None = None
    group: int | None = None

    def arguments(self) -> list[str]:
        """Of bubblewrap."""
        words = ["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--die-with-parent", "--new-session", "--as-pid-1"]
        words += [] if self.shares_network else ["--unshare-net"]
        words += ["--cap-add", "ALL", "--proc", "/proc", "--dev", "/dev", *_tops()]
        words += ["--bind" if self.opt_is_writable else "--ro-bind", str(self.opt), "/opt"]
        if self.opt_is_writable:
            words += ["--tmpfs", "/tmp"]
        for mount in (SHARED_MEMORY, *self.mounts):
            words += _mounted(mount)
        words += ["--remount-ro", "/", "--clearenv", "--setenv", "PATH", self.PATH]
        for name, value in self.environment.items():
            words += ["--setenv", name, value]
        return [*words, "--chdir", self.folder, "--", *self._unprivileged(), *self.command]

    def _unprivileged(self) -> list[str]:
        if self.user is None:
            return []
        rights = ["--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]
        groups = [f"--regid={self.group}", f"--groups={self.group}"]
        return ["setpriv", f"--reuid={self.user}", *groups, *rights, "--"]


def _tops() -> list[str]:
    words = []
    for top in TOPS:
        path = Path("/") / top
        if path.is_symlink():
            words += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            words += ["--ro-bind", str(path), str(path)]
    return [*words, *_python()]


def _python() -> list[str]:
    """This machine's Python, where it lies outside those; bubblewrap makes folders on the way for root alone."""
    base = Path(sys.base_prefix).resolve()
    if base.parts[1] in TOPS:
        return []
    way = [word for folder in reversed(base.parents[:-1]) for word in ("--perms", "0755", "--dir", str(folder))]
    return [*way, "--ro-bind", str(base), str(base)]


def _mounted(mount: Mount) -> list[str]:
    if mount.source is None:
        return ["--perms", "1777", "--size", str(mount.bytes), "--tmpfs", mount.path]
    return ["--ro-bind" if mount.is_read_only else "--bind", str(mount.source), mount.path]


def bubblewrap() -> str:
    """The program. Fails with what is missing."""
    if os.geteuid() != 0:
        pytest.fail("these tests start processes as another user; run them as root, as in a container of CI.")
    return program("bwrap")


class ContainerError(Exception):
    """A container ended with another code than 0; `output` is what it wrote to stdout and stderr."""

    def __init__(self, command: Sequence[str], code: int, output: str) -> None:
        super().__init__(f"{' '.join(command)} ended with exit code {code}:\n{output}")
        self.output = output


def run(container: Container, limit_s: float) -> str:
    """Runs it to its end; what it wrote. Raises `ContainerError`, with that, if it fails."""
    result = subprocess.run(
        [bubblewrap(), *container.arguments()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit_s,
        preexec_fn=_politely,
    )
    if result.returncode != 0:
        raise ContainerError(container.command, result.returncode, result.stdout)
    return result.stdout


@dataclass
class Running:
    """`process` is the one inside, as this machine sees it; `wrapper` ends after it, with its code."""

    process: int
    wrapper: subprocess.Popen[bytes]

    def entered(self, command: Sequence[str]) -> list[str]:
        """The command, run in the container's network, with this machine's files and rights."""
        return ["nsenter", f"--net=/proc/{self.process}/ns/net", "--", *command]


@contextmanager
def started(container: Container, log: Path) -> Iterator[Running]:
    """It runs inside the `with`, and is killed at its end; all that it writes goes to `log`."""
    reading, writing = os.pipe()
    with log.open("wb") as output:
        wrapper = subprocess.Popen(
            [bubblewrap(), "--info-fd", str(writing), *container.arguments()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[writing],
            preexec_fn=_politely,
        )
    os.close(writing)
    try:
        with os.fdopen(reading) as info:
            text = info.read()
        assert text, log.read_text()
        yield Running(json.loads(text)["child-pid"], wrapper)
    finally:
        wrapper.kill()  # and with it, what is inside
        wrapper.wait()


def _politely() -> None:
    os.nice(5)
