"""One session at a time through a served pipe, recorded by its client and by the stages' trace."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from live_avatar.assets import DEMO_PROMPT, PORTRAIT
from live_avatar.errors import InputError
from live_avatar.serving.trace import Interval
from live_avatar_client import AvatarSession
from perf.figures import BlockTimes
from perf.growth import group, own_cpu_s
from perf.load import PATIENCE_S, Speaker, demo_blocks
from perf.scenario import Target

WINDOW = 8
"""The client library's default limit on blocks in flight."""
SETTLED = 6
"""Number of blocks after which caches are full and the sink is replaced."""


@dataclass(frozen=True)
class Observed:
    """One session: its blocks as the client saw them, and the stages' intervals.

    cpu_s: CPU time of server and client from the first block received to the last, without the session's start.
    """

    blocks: list[BlockTimes]
    intervals: list[Interval]
    cpu_s: float


def observe(target: Target, blocks: int, *, window: int = WINDOW, prompt: str = DEMO_PROMPT) -> Observed:
    """Sends recorded speech as fast as possible, with at most `window` blocks in flight.

    Raises `InputError` for a server that was started elsewhere.
    """
    if target.trace is None or not target.pids:
        raise InputError("the stages' times are read from the server's trace; leave --url out.")
    speech = demo_blocks(blocks).reshape(-1)
    session = AvatarSession(
        target.url,
        image=PORTRAIT.read_bytes(),
        prompt=prompt,
        max_in_flight_blocks=window,
        answer_timeout_s=PATIENCE_S,
        keep_alive_s=PATIENCE_S,
    )
    with session:
        stream = session.stream([speech])
        seen = [BlockTimes.of(next(stream))]
        begun_s = _cpu_s(target.pids)
        seen += [BlockTimes.of(block) for block in stream]
        cpu_s = _cpu_s(target.pids) - begun_s
    return Observed(seen, Speaker(target, Path()).intervals(seen), cpu_s)


def _cpu_s(leaders: Collection[int]) -> float:
    """CPU time of the server's processes and of this process, the client."""
    return sum(process.cpu_s for process in group(leaders)) + own_cpu_s()
