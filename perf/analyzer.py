"""Runs NVIDIA's perf_analyzer on the ensemble and reads its results.

It sends sequences over one gRPC stream, with the input data of `perf.input_data`: START with the first block of a
sequence, END with the last. perf_analyzer sends whole blocks, at a request rate (all at once, or 25/12 per second,
which is playback pace) or with one block in flight per sequence. It cannot send the 20 ms chunks of a microphone, nor
START before there is speech; the client library can.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from live_avatar.errors import ServerError
from live_avatar_client.protocol import FPS, FRAMES_PER_BLOCK, MODEL_NAME
from perf.figures import BlockTimes

PLACE = Path(__file__).parents[1] / ".perf" / "bin" / "perf_analyzer"
GET = "perf/get_perf_analyzer.sh"
REAL_TIME = FPS / FRAMES_PER_BLOCK
"""Blocks per second of one session at playback pace."""
LIMIT_S = 600.0


@dataclass(frozen=True)
class Load:
    """What to send: `blocks` in total, by `sequences` at once, at a total `rate` of blocks per second. A rate of None
    keeps one block of each sequence in flight."""

    blocks: int
    sequences: int = 1
    rate: float | None = None
    first_id: int = 1


@dataclass(frozen=True)
class AnalyzerRun:
    """One run: blocks of each sequence in the order of sending; times are of `time.monotonic`."""

    command: tuple[str, ...]
    version: str
    sequences: Mapping[int, tuple[BlockTimes, ...]]
    said: str

    @property
    def blocks(self) -> list[BlockTimes]:
        return [block for blocks in self.sequences.values() for block in blocks]


def program() -> Path:
    """perf_analyzer in `.perf/`, else on the PATH. Raises `ServerError` if there is none."""
    found = PLACE if PLACE.exists() else shutil.which("perf_analyzer")
    if found is None:
        raise ServerError(f"there is no perf_analyzer; run {GET}, or run in Triton's -py3-sdk image.")
    return Path(found)


ID_RANGE = 1_000_000
"""Number of sequence ids for one run of perf_analyzer, which begins a new sequence after each."""


def options(load: Load) -> list[str]:
    """Options of perf_analyzer for a load. It refuses fewer requests than the rate, and a rate of 0."""
    if load.rate is None:
        pace = ["--concurrency-range", str(load.sequences), "--serial-sequences"]
    else:
        pace = ["--request-rate-range", f"{load.rate:.5f}", "--num-of-sequences", str(load.sequences)]
    # Without an end some builds of 2.51 refuse the range.
    ids = ["--sequence-id-range", f"{load.first_id}:{load.first_id + ID_RANGE}"]
    return [*pace, *ids, "--request-count", str(load.blocks), "--max-threads", "1"]


def measure(url: str, data: Path, load: Load, scratch: Path) -> AnalyzerRun:
    """Runs it once. Raises `ServerError` with its message if it fails or the server refuses."""
    export = scratch / f"export-{load.first_id}.json"
    fixed = ["-m", MODEL_NAME, "-u", url, "-i", "grpc", "--streaming", "--input-data", str(data)]
    command = [str(program()), *fixed, *options(load), "--profile-export-file", str(export)]
    clocks_s = time.time() - time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    said = (done.stdout + done.stderr).strip()
    if done.returncode or not export.exists():
        raise ServerError(f"perf_analyzer ended with code {done.returncode}: {_reason(said)}")
    document = json.loads(export.read_text())
    export.unlink()  # it has every frame as a list of numbers
    return AnalyzerRun(_shown(command), version(), sequences(document, clocks_s), said)


def sequences(document: Mapping[str, Any], clocks_s: float) -> dict[int, tuple[BlockTimes, ...]]:
    """Reads an export. Its times are nanoseconds since 1970, which is `clocks_s` more than `time.monotonic`.

    A block is sent whole, so its three times (begun, complete, sent) are the same.
    """
    found: defaultdict[int, list[BlockTimes]] = defaultdict(list)
    for request in document["experiments"][0]["requests"]:
        if not request["response_timestamps"]:
            raise ServerError(f"perf_analyzer saw no answer to a block of sequence {request['sequence_id']}.")
        sent_s = request["timestamp"] / 1e9 - clocks_s
        received_s = request["response_timestamps"][0] / 1e9 - clocks_s
        found[int(request["sequence_id"])].append(BlockTimes(FRAMES_PER_BLOCK, sent_s, sent_s, sent_s, received_s))
    return {sequence: tuple(sorted(blocks, key=lambda b: b.sent_s)) for sequence, blocks in found.items()}


def version() -> str:
    """The version, such as `2.51.0`."""
    said = subprocess.run([str(program()), "--version"], capture_output=True, text=True, timeout=60, check=False)
    words = (said.stdout + said.stderr).split()
    return words[words.index("Version") + 1] if "Version" in words else "unknown"


def _shown(command: Sequence[str]) -> tuple[str, ...]:
    """The command, without paths and ports of this machine."""
    url = command.index("-u") + 1
    named = [*command[:url], "HOST:PORT", *command[url + 1 :]]
    return tuple(Path(word).name if word.startswith("/") else word for word in named)


def _reason(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    wrong = [line for line in lines if line.lower().startswith(("error", "failed", "thread"))]
    return " ".join(wrong[:3] or lines[-3:]) or "it said nothing"
