"""Growth of the memory of process groups: samples from Linux's /proc, and slopes with their standard errors."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from live_avatar.serving.supervisor import model_of

MIB = 2**20
KIB_PER_MIB = 1024
SHARED_MEMORY = Path("/dev/shm")
LEAST_SAMPLES = 30
GATEWAY = "live_avatar.gateway"
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Process:
    """One process: its name and state, and the CPU time of it and of the children that it has waited for."""

    pid: int
    name: str
    stage: bool
    zombie: bool
    threads: int
    cpu_s: float


@dataclass(frozen=True)
class Slope:
    """Slope of a fitted line and its standard error, in MiB per hour, and the number of samples."""

    mib_per_hour: float
    error: float
    samples: int

    def exceeds(self, bound: float, errors: float = 3.0) -> bool:
        """Whether it exceeds `bound` MiB per hour by more than `errors` standard errors."""
        return self.mib_per_hour - errors * self.error > bound


def group(leaders: Collection[int]) -> list[Process]:
    """The processes of the process groups `leaders`: Triton, the gateway, and the stages by their models' names."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError, IndexError):  # it has ended meanwhile
                if (process := _process(int(folder.name), leaders)) is not None:
                    found.append(process)
    return sorted(found, key=lambda process: process.pid)


def own_cpu_s() -> float:
    """CPU time of this process, and of the children that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def private_mib(pid: int) -> float | None:
    """Private memory that the process has written to; None if it is gone.

    Unchanged pages of files, such as libraries, do not count: whether they are private or shared depends on the other
    processes of the machine.
    """
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / KIB_PER_MIB
    return None


def shared_mib(triton: int) -> float:
    """Size of the shared memory files of the Triton with process id `triton`."""
    command = Path(f"/proc/{triton}/cmdline").read_bytes().decode(errors="replace").split("\0")
    prefixes = [word.partition("shm-region-prefix-name=")[2] for word in command]
    total = 0
    for prefix in filter(None, prefixes):
        for region in SHARED_MEMORY.glob(f"{prefix}*"):
            with suppress(OSError):
                total += region.stat().st_blocks * 512
    return total / MIB


def fit(times_s: Sequence[float], mib: Sequence[float]) -> Slope:
    """The least-squares line through at least three samples.

    Neighbouring samples of a process are correlated, so the error is widened as for an AR(1) process.
    """
    times, values = np.asarray(times_s, dtype=np.float64) / 3600, np.asarray(mib, dtype=np.float64)
    centred = times - times.mean()
    spread = float((centred**2).sum())
    slope = float(centred @ values) / spread
    left = values - values.mean() - slope * centred
    variance = float((left**2).sum()) / (len(values) - 2)
    return Slope(slope, float(np.sqrt(variance / spread * _widening(left))), len(values))


def _widening(residuals: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
    """Factor of the variance for the correlation of neighbouring samples; 1 without correlation."""
    power = float((residuals**2).sum())
    if power == 0:
        return 1.0
    correlation = min(max(float(residuals[1:] @ residuals[:-1]) / power, 0.0), 0.99)
    return (1 + correlation) / (1 - correlation)


def _process(pid: int, leaders: Collection[int]) -> Process | None:
    before, _, after = Path(f"/proc/{pid}/stat").read_bytes().decode(errors="replace").rpartition(")")
    fields = after.split()
    if int(fields[2]) not in leaders:
        return None
    command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    cpu_s = sum(int(ticks) for ticks in fields[11:15]) / TICKS_PER_S
    model = model_of(command)  # a zombie has no command line
    leader = "gateway" if GATEWAY in command else "triton"
    name = model or (leader if pid in leaders else before.partition("(")[2])
    return Process(pid, name, model is not None, fields[0] == "Z", int(fields[17]), cpu_s)


@dataclass
class Series:
    """Samples of one process, or of /dev/shm."""

    times_s: list[float] = field(default_factory=list)
    mib: list[float] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)


class Memory:
    """Samples of every process, by name and process id. A replaced process begins a new series."""

    def __init__(self, triton: int) -> None:
        self.series: defaultdict[tuple[str, int], Series] = defaultdict(Series)
        self._triton = triton

    def sample(self, processes: Iterable[Process], now_s: float) -> None:
        for process in processes:
            self._add(process.name, process.pid, private_mib(process.pid), now_s, process.threads)
        self._add("this process", os.getpid(), private_mib(os.getpid()), now_s, threading.active_count())
        with suppress(OSError):  # Triton has ended
            self._add("/dev/shm", 0, shared_mib(self._triton), now_s, 0)

    def now(self, name: str) -> float:
        """The latest sample with this name, in MiB."""
        return next((one.mib[-1] for (known, _), one in reversed(list(self.series.items())) if known == name), 0.0)

    def findings(self, from_s: float) -> list[dict[str, Any]]:
        """First and last value of each series, and its slope from `from_s` on if there are enough samples."""
        return [
            {
                "name": name,
                "samples": len(one.mib),
                "first_mib": round(one.mib[0], 2),
                "last_mib": round(one.mib[-1], 2),
                "most_mib": round(max(one.mib), 2),
                "threads_first": one.threads[0],
                "threads_last": one.threads[-1],
                "slope": asdict(slope) if (slope := slope_after(one, from_s)) else None,
            }
            for (name, _), one in self.series.items()
        ]

    def _add(self, name: str, pid: int, mib: float | None, now_s: float, threads: int) -> None:
        if mib is not None:
            one = self.series[name, pid]
            one.times_s.append(now_s)
            one.mib.append(mib)
            one.threads.append(threads)


def slope_after(series: Series, from_s: float) -> Slope | None:
    """The slope of the samples from `from_s` on; None for too few."""
    late = [pair for pair in zip(series.times_s, series.mib, strict=True) if pair[0] >= from_s]
    return fit(*zip(*late, strict=True)) if len(late) >= LEAST_SAMPLES else None
