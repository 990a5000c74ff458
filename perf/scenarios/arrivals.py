"""Two sessions in real time, first alone and then while new avatars arrive: what the starts of others cost them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from perf.figures import BlockTimes, Latency, latency, playback
from perf.load import Speaker
from perf.report import lines_picture
from perf.scenario import Context, Figures, Scenario, check

LIVE = 2
BLOCKS, QUICK_BLOCKS = 125, 20  # 60 s and 10 s of speech
ARRIVALS_PER_MINUTE = 8
MOST_BY_QUIET = 1.3


def measure(context: Context) -> Figures:
    blocks = QUICK_BLOCKS if context.quick else BLOCKS
    with context.server() as target, tempfile.TemporaryDirectory() as scratch:
        speaker = Speaker(target, Path(scratch))
        speaker.warm_up()
        quiet = _live(speaker, blocks, lambda done: None)
        starts_s: list[float] = []
        busy = _live(speaker, blocks, lambda done: starts_s.extend(_arrivals(context, speaker, done)))
    found = {"quiet": [_latency(session) for session in quiet], "arrivals": [_latency(session) for session in busy]}
    p50, p95 = (
        max(getattr(one, name) for one in found["arrivals"]) / max(getattr(one, name) for one in found["quiet"])
        for name in ("p50_s", "p95_s")
    )
    stalls = {name: sum(playback(s).stalls for s in of) for name, of in (("quiet", quiet), ("arrivals", busy))}
    lines_picture(
        context.picture("arrivals"),
        f"Audio-to-frame latency of {LIVE} sessions in real time",
        "block of 0.48 s",
        "last sample to frames, ms",
        {"alone": _waits_ms(quiet), f"{ARRIVALS_PER_MINUTE} new avatars a minute": _waits_ms(busy)},
    )
    return {
        "live_sessions": LIVE,
        "blocks_per_session": blocks,
        "arrivals": len(starts_s),
        "first_frames_of_arrivals_s": starts_s,
        "latency": found,
        "stalls": stalls,
        "latency_by_quiet": {"p50": p50, "p95": p95},
        "checks": [
            check("stalls beside new avatars", stalls["arrivals"], at_most=0),
            check("p50 latency beside new avatars by quiet", p50, at_most=MOST_BY_QUIET),
            check("p95 latency beside new avatars by quiet", p95, at_most=MOST_BY_QUIET),
        ],
    }


def _live(speaker: Speaker, blocks: int, meanwhile: Callable[[Callable[[], bool]], None]) -> list[list[BlockTimes]]:
    """The blocks of the live sessions; `meanwhile` runs beside them, and is told whether they have ended."""
    with ThreadPoolExecutor(LIVE) as pool:
        sessions: list[Future[list[BlockTimes]]] = [pool.submit(speaker.spoken, blocks) for _ in range(LIVE)]
        meanwhile(lambda: any(session.done() for session in sessions))
        return [session.result() for session in sessions]


def _arrivals(context: Context, speaker: Speaker, done: Callable[[], bool]) -> list[float]:
    """New avatars at a steady pace until `done`: the time from START to the first frames of each."""
    found: list[float] = []
    pause_s = 60.0 / ARRIVALS_PER_MINUTE
    next_s = time.monotonic() + pause_s / 2
    while not done():
        time.sleep(min(0.1, max(0.0, next_s - time.monotonic())))
        if time.monotonic() >= next_s:
            next_s += pause_s
            [block] = speaker.spoken(1, prompt=f"Arrival {len(found)} of seed {context.seed}.", realtime=False)[:1]
            found.append(block.received_s - block.sent_s)
    return found


def _latency(blocks: list[BlockTimes]) -> Latency:
    return latency(blocks, skipped=4)


def _waits_ms(sessions: list[list[BlockTimes]]) -> tuple[list[float], list[float]]:
    first = sessions[0][4:]
    return [float(n) for n in range(4, 4 + len(first))], [1e3 * (b.received_s - b.complete_s) for b in first]


ABOUT = f"{LIVE} sessions in real time while {ARRIVALS_PER_MINUTE} new avatars a minute start"
SCENARIO = Scenario("arrivals", ABOUT, measure)
