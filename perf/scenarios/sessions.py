"""1, 2, 4, ... real-time sessions at once, until one stalls; and the memory of each."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from perf.analyzer import REAL_TIME, AnalyzerRun
from perf.figures import Latency, Playback, latency, per_session, playback, real_time_sessions, throughput
from perf.growth import group, private_mib
from perf.load import Speaker
from perf.report import lines_picture
from perf.scenario import Context, Figures, Scenario, Target, check

COUNTS, QUICK_COUNTS = (1, 2, 3, 4, 5, 6, 8), (1, 2)
BLOCKS, QUICK_BLOCKS = 60, 6
SAMPLE_S = 0.5
ROOM = 16
"""Sessions that the server admits; more than this machine's cores can serve in real time."""


def measure(context: Context) -> Figures:
    counts, blocks = (QUICK_COUNTS, QUICK_BLOCKS) if context.quick else (COUNTS, BLOCKS)
    by_count: dict[int, Figures] = {}
    with _server(context) as target, tempfile.TemporaryDirectory() as scratch:
        speaker = Speaker(target, Path(scratch))
        speaker.warm_up()
        idle_mib = server_mib(target)
        for count in counts:
            with peak_memory(target) as peak:
                runs = speaker.analyzed_at_once(count, blocks, REAL_TIME)
            by_count[count] = {**seen(runs), "memory_mib": peak.mib}
            context.log(f"{count} sessions: {by_count[count]['stalls']} stalls")
            if by_count[count]["stalls"]:
                break
    good = real_time_sessions({count: found["stalls"] for count, found in by_count.items()})
    _picture(context, by_count)
    figures: Figures = {
        "blocks_per_session": blocks,
        "command_of_perf_analyzer": " ".join(runs[0].command),
        "by_sessions": by_count,
        "real_time_sessions": good,
        "memory_without_sessions_mib": idle_mib,
        "checks": [check("real-time sessions", good, at_least=1)],
    }
    memory = {count: found["memory_mib"] for count, found in by_count.items() if found["memory_mib"]}
    if len(memory) > 1:
        figures["memory_per_session_mib"] = per_session(memory)
    return figures


def seen(runs: list[AnalyzerRun]) -> Figures:
    """Playback of all sessions, and latencies of all their blocks together."""
    sessions = [run.blocks for run in runs]
    players: list[Playback] = [playback(blocks) for blocks in sessions]
    together: Latency = latency([block for blocks in sessions for block in blocks[1:]], skipped=0)
    return {
        "stalls": sum(player.stalls for player in players),
        "longest_gap_s": max(player.longest_gap_s for player in players),
        "fps_together": throughput([block for blocks in sessions for block in blocks]).fps,
        "latency": together,
        "ttff_s_at_most": max(blocks[0].received_s - blocks[0].sent_s for blocks in sessions),
    }


@contextmanager
def _server(context: Context) -> Iterator[Target]:
    """A server that admits more sessions than the profile, unless it was started elsewhere."""
    with context.server(**({} if context.url else {"max_sessions": ROOM})) as target:
        yield target


@dataclass
class PeakMemory:
    """The largest memory in MiB; None if the processes are not visible."""

    mib: float | None = None
    over: threading.Event = field(default_factory=threading.Event)

    def watch(self, sample: Callable[[], float | None]) -> None:
        while not self.over.wait(SAMPLE_S):
            if (mib := sample()) is not None:
                self.mib = max(self.mib or 0.0, mib)


@contextmanager
def peak_memory(target: Target) -> Iterator[PeakMemory]:
    """The largest private memory of all the server's processes together, inside the `with`."""
    peak = PeakMemory()
    thread = threading.Thread(target=peak.watch, args=(lambda: server_mib(target),), daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        peak.over.set()
        thread.join()
        time.sleep(SAMPLE_S)  # until the sessions have ended


def server_mib(target: Target) -> float | None:
    """Private memory of Triton, its stages and the gateway."""
    if not target.pids:
        return None
    return sum(private_mib(process.pid) or 0.0 for process in group(target.pids))


def _picture(context: Context, by_count: dict[int, Figures]) -> None:
    counts = [float(count) for count in by_count]
    found = {
        name: (counts, [getattr(one["latency"], f"{name}_s") * 1e3 for one in by_count.values()])
        for name in ("p50", "p95", "p99")
    }
    lines_picture(
        context.picture("sessions"),
        "Sessions at once, each in real time",
        "sessions",
        "audio-to-frame latency, ms",
        found,
    )


SCENARIO = Scenario("sessions", "1, 2, 3, ... sessions at once in real time, until one stalls", measure)
