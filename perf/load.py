"""Sessions for measurements, with the demo's picture and speech, through one of two real clients.

The client library sends START when it connects and speech in chunks of any size, like an application. perf_analyzer
sends START with the first whole block, so all work for TTFF lies between two of its times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from live_avatar.arrays import Array
from live_avatar.assets import DEMO_PROMPT, PORTRAIT, SPEECH
from live_avatar.cli.demo import spoken
from live_avatar.serving.trace import Interval, read_trace
from live_avatar_client import AvatarSession, Block
from live_avatar_client.media import read_speech
from live_avatar_client.protocol import FRAMES_PER_BLOCK, FRAMES_PER_LATENT
from perf import analyzer
from perf.analyzer import AnalyzerRun, Load
from perf.figures import BlockTimes
from perf.input_data import blocks_of, write_input_data
from perf.scenario import Target

FIRST_ID = 1_000_000
PATIENCE_S = 3600.0
"""Long, because a run may be paused while others measure."""


@dataclass
class Speaker:
    """Creates the load on one server. Every run of perf_analyzer has its own sequence ids."""

    target: Target
    scratch: Path
    runs: int = 0

    def analyzed(self, blocks: int, rate: float | None, *, prompt: str = DEMO_PROMPT) -> AnalyzerRun:
        """perf_analyzer: one sequence of `blocks` blocks, at `rate` per second."""
        return self._analyzed(blocks, rate, prompt, self._next_id())

    def analyzed_at_once(self, sessions: int, blocks: int, rate: float) -> list[AnalyzerRun]:
        """Several perf_analyzers at once, each with one sequence, because one alone mixes the pace of its sequences."""
        ids = [self._next_id() for _ in range(sessions)]
        with ThreadPoolExecutor(sessions) as pool:
            return list(pool.map(lambda first: self._analyzed(blocks, rate, DEMO_PROMPT, first), ids))

    def spoken(self, blocks: int, *, prompt: str = DEMO_PROMPT, realtime: bool = True) -> list[BlockTimes]:
        """The client library: chunks of 20 ms at the pace of speech, or all speech at once."""
        speech = demo_blocks(blocks).reshape(-1)
        with self.session(prompt) as session:
            return [BlockTimes.of(block) for block in session.stream(spoken(speech) if realtime else [speech])]

    def streamed(self, blocks: Iterator[Array], seen: Callable[[Block], object]) -> None:
        """The client library: blocks as fast as possible; each answer goes to `seen` and is not kept."""
        with self.session() as session:
            for block in session.stream(blocks):
                seen(block)

    def first_frames(self, *, prompt: str = DEMO_PROMPT) -> float:
        """Seconds from the client's connection to the first frames, of speech at hand. They come as soon as they are
        decoded."""
        begun_s = time.monotonic()
        with self.session(prompt, frames_per_response=FRAMES_PER_LATENT) as session:
            first, *_ = session.stream([demo_blocks(1).reshape(-1)])
        return first.received_at_s - begun_s

    def session(
        self, prompt: str = DEMO_PROMPT, *, idle: bool = False, frames_per_response: int = FRAMES_PER_BLOCK
    ) -> AvatarSession:
        return AvatarSession(
            self.target.url,
            image=PORTRAIT.read_bytes(),
            prompt=prompt,
            frames_per_response=frames_per_response,
            idle=idle,
            answer_timeout_s=PATIENCE_S,
            keep_alive_s=PATIENCE_S,
        )

    def warm_up(self) -> None:
        """Warms up: the demo's avatar becomes known, and every stage has its first run."""
        self.analyzed(6, None)

    def intervals(self, blocks: Sequence[BlockTimes]) -> list[Interval]:
        """The stages' intervals from the first of the blocks to the last; empty for a server without a trace."""
        if self.target.trace is None:
            return []
        begun_s, ended_s = min(b.sent_s for b in blocks) - 1e-3, max(b.received_s for b in blocks)
        return [i for i in read_trace(self.target.trace) if begun_s <= i.start_s <= ended_s]

    def _analyzed(self, blocks: int, rate: float | None, prompt: str, first: int) -> AnalyzerRun:
        data = write_input_data(
            self.scratch / f"input-{first}.json", PORTRAIT.read_bytes(), prompt, demo_blocks(blocks)
        )
        load = Load(blocks, rate=None if rate is None else min(rate, float(blocks)), first_id=first)
        run = analyzer.measure(self.target.url, data, load, self.scratch)
        # With a rate it begins the next sequence while it waits for the last answers.
        return replace(run, sequences={first: run.sequences[first][:blocks]})

    def _next_id(self) -> int:
        self.runs += 1
        return FIRST_ID * self.runs


def demo_blocks(blocks: int) -> Array:
    """int16 [blocks, samples]: the demo's speech, repeated."""
    return blocks_of(read_speech(SPEECH), blocks)
