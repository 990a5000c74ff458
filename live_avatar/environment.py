"""What a figure was measured on: processor, cores, versions. Every report carries it."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from live_avatar.version import __version__


def environment(*packages: str) -> dict[str, object]:
    """The machine, Python, this project's version and those of the named packages, as JSON values."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "live_avatar": __version__,
        **{package: metadata.version(package) for package in packages},
    }


def _processor() -> str:
    """The processor's name as Linux gives it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
