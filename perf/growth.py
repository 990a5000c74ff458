"""How the memory of a group of processes grows: samples from Linux's /proc, and slopes with their standard errors.

Knows processes, files of shared memory and straight lines; knows nothing of what the processes do.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MIB = 2**20
KIB_PER_MIB = 1024
STUB = "triton_python_backend_stub"
SHARED_MEMORY = Path("/dev/shm")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Process:
    """One process: what it is, and the CPU time of it and of the children that it has waited for."""

    pid: int
    name: str
    stage: bool
    zombie: bool
    threads: int
    cpu_s: float


@dataclass(frozen=True)
class Slope:
    """A straight line's slope and its standard error, in MiB per hour, and from how many samples."""

    mib_per_hour: float
    error: float
    samples: int

    def exceeds(self, bound: float, errors: float = 3.0) -> bool:
        """Whether it is above `bound` MiB per hour by more than so many standard errors."""
        return self.mib_per_hour - errors * self.error > bound


def group(leader: int) -> list[Process]:
    """The processes of the process group `leader`: Triton, and its stages by their models' names."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError, IndexError):  # it ended while we looked
                if (process := _process(int(folder.name), leader)) is not None:
                    found.append(process)
    return sorted(found, key=lambda process: process.pid)


def own_cpu_s() -> float:
    """CPU time of this process, and of the children that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def private_mib(pid: int) -> float | None:
    """Memory that only this process has; None if it is gone."""
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / KIB_PER_MIB
    return None


def shared_mib(leader: int) -> float:
    """What the files of shared memory of the Triton with process id `leader` occupy."""
    command = Path(f"/proc/{leader}/cmdline").read_bytes().decode(errors="replace").split("\0")
    prefixes = [word.partition("shm-region-prefix-name=")[2] for word in command]
    total = 0
    for prefix in filter(None, prefixes):
        for region in SHARED_MEMORY.glob(f"{prefix}*"):
            with suppress(OSError):
                total += region.stat().st_blocks * 512
    return total / MIB


def fit(times_s: Sequence[float], mib: Sequence[float]) -> Slope:
    """The least-squares line through at least three samples.

    Neighbouring samples of a process are alike, so the error is widened by their correlation (as of an AR(1) process).
    """
    times, values = np.asarray(times_s, dtype=np.float64) / 3600, np.asarray(mib, dtype=np.float64)
    centred = times - times.mean()
    spread = float((centred**2).sum())
    slope = float(centred @ values) / spread
    left = values - values.mean() - slope * centred
    variance = float((left**2).sum()) / (len(values) - 2)
    return Slope(slope, float(np.sqrt(variance / spread * _widening(left))), len(values))


def _widening(residuals: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
    """By how much correlation from one sample to the next raises a variance; 1 without any."""
    power = float((residuals**2).sum())
    if power == 0:
        return 1.0
    correlation = min(max(float(residuals[1:] @ residuals[:-1]) / power, 0.0), 0.99)
    return (1 + correlation) / (1 - correlation)


def _process(pid: int, leader: int) -> Process | None:
    before, _, after = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    fields = after.split()
    if int(fields[2]) != leader:
        return None
    command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    cpu_s = sum(int(ticks) for ticks in fields[11:15]) / TICKS_PER_S
    stage = command[0].endswith(STUB)
    # The stub's command line is STUB MODEL/VERSION/model.py; a zombie has none.
    name = Path(command[1]).parents[1].name if stage else "triton" if pid == leader else before.partition("(")[2]
    return Process(pid, name, stage, fields[0] == "Z", int(fields[17]), cpu_s)
