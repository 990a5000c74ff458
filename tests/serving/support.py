"""What the tests of sessions and of their endings share: a server's numbers, and sessions that must go well."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np

from live_avatar.arrays import Array
from live_avatar.assets import PORTRAIT
from live_avatar.serving.metrics import Metric, read_series
from live_avatar.serving.server import TritonServer
from live_avatar.serving.supervisor import WITHOUT_PROXY
from live_avatar_client import AvatarSession, Block, SessionRefused
from live_avatar_client.pacing import BLOCK_S
from live_avatar_client.protocol import BLOCK_SAMPLES, FRAMES_PER_BLOCK, ErrorCode
from perf.growth import Memory, Process, group

STAGES = ("conditioning", "dit_step_1", "dit_step_2", "dit_step_3", "dit_step_4", "vae_decoder")
KEEP_ALIVE_S = 0.3  # for servers with an idle limit of seconds, on a machine that is busy
METRICS_S = 60.0
Numbers = dict[str, float]
"""Value by series, as `series` names it."""


Pacing = Callable[[Array], Iterator[Array]]


def at_once(speech: Array) -> Iterator[Array]:
    yield speech


def received(url: str, picture: bytes, speech: Array, pacing: Pacing = at_once, seed: int = 3) -> list[Block]:
    with AvatarSession(url, image=picture, prompt="hello", seed=seed) as session:
        return list(session.stream(pacing(speech)))


def frames_of(blocks: list[Block]) -> Array:
    return np.concatenate([block.frames for block in blocks])


def scrape(server: TritonServer) -> Numbers:
    """All numbers of the server's /metrics."""
    return read_series(metrics_page(server))


def metrics_page(server: TritonServer) -> str:
    """The server's /metrics. Triton opens this port last, which may be a moment after the server is ready."""
    url = f"http://{server.options.host}:{server.options.metrics_port}/metrics"
    deadline_s = time.monotonic() + METRICS_S
    while True:
        try:
            with WITHOUT_PROXY.open(url, timeout=METRICS_S) as answer:
                page: str = answer.read().decode()
            return page
        except URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError) or time.monotonic() > deadline_s:
                raise
        time.sleep(0.05)


def command_of(server: TritonServer) -> str:
    """Triton's command line, words apart by NUL."""
    return Path(f"/proc/{server.process.pid}/cmdline").read_bytes().decode()


def scratch_of(server: TritonServer) -> Path:
    """The folder of the server's temporary files."""
    return Path(command_of(server).split("--model-repository=")[1].split("\0")[0]).parent


def series(metric: Metric, label: str = "") -> str:
    """Name of a metric's series; `label` is the value of its one label."""
    return f'{metric.name}{{{metric.labels[0]}="{label}"}}' if label else metric.name


def changes(before: Numbers, after: Numbers, metric: Metric) -> dict[str, int]:
    """By how much each series of a metric with one label has grown, by label; without those that have not."""
    start = f'{metric.name}{{{metric.labels[0]}="'
    grown = {name: round(value - before.get(name, 0)) for name, value in after.items() if name.startswith(start)}
    return {name.removeprefix(start).removesuffix('"}'): count for name, count in grown.items() if count}


def speech_of(speech: Array, first: int, stop: int) -> Array:
    """Blocks `first` to `stop` (without it, from 0)."""
    return speech[first * BLOCK_SAMPLES : stop * BLOCK_SAMPLES]


def frames_until(expected: Array, blocks: int) -> Array:
    return expected[: blocks * FRAMES_PER_BLOCK]


def spoken(session: AvatarSession, speech: Array) -> Block:
    """The next block of frames, after sending one of speech."""
    session.send(speech)
    return next(iter(session))


def frames_in(answer: Any) -> Array:
    """The frames of an answer to a raw request; fails with the words of an error."""
    assert not isinstance(answer, str), answer
    frames: Array = answer.as_numpy("FRAMES")
    return frames


@contextmanager
def bystander(url: str, picture: bytes, speech: Array, expected: Array) -> Iterator[None]:
    """A session that is live inside the `with`, has spoken before and speaks after it, and gets its right frames."""
    with AvatarSession(url, image=picture, prompt="hello", seed=3, keep_alive_s=KEEP_ALIVE_S) as live:
        first = spoken(live, speech_of(speech, 0, 1))
        yield
        live.send(speech_of(speech, 1, 3))
        live.end()
        frames = frames_of([first, *live])
    assert np.array_equal(frames, frames_until(expected, 3))


def assert_every_slot_serves(server: TritonServer, picture: bytes, speech: Array, expected: Array) -> None:
    """As many new sessions as the server takes, open at once, all get their right frames."""
    sessions = int(scrape(server)["live_avatar_sessions_limit"])
    with ExitStack() as stack:
        live = [
            stack.enter_context(
                AvatarSession(server.options.url, image=picture, prompt="hello", seed=3, keep_alive_s=KEEP_ALIVE_S)
            )
            for _ in range(sessions)
        ]
        for session in live:
            session.send(speech_of(speech, 0, 2))
            session.end()
        for session in live:
            assert np.array_equal(frames_of(list(session)), frames_until(expected, 2))


@contextmanager
def watched(server: TritonServer) -> Iterator[Memory]:
    """Samples of the memory of the server's lasting processes, one a second; asserts that they are the same at the end.

    Those that decode pictures come and go.
    """
    leaders, over = server.process_ids, threading.Event()

    def lasting() -> list[Process]:
        return [process for process in group(leaders) if process.stage or process.pid in leaders]

    memory, before = Memory(server.process.pid), [process.pid for process in lasting()]

    def sample() -> None:
        while not over.wait(1.0):
            memory.sample(lasting(), time.monotonic())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield memory
    finally:
        over.set()
        thread.join()
    assert server.process_ids == leaders
    assert [process.pid for process in lasting()] == before, "a process has ended or another has come"


@dataclass
class Neighbour:
    """Sessions one after the other, at the pace of speech, whose frames must be right."""

    url: str
    speech: Array
    expected: Array
    rounds: int = 0
    wrong: BaseException | None = None
    over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        try:
            while not (self.over.is_set() and self.rounds):
                try:
                    with AvatarSession(self.url, image=PORTRAIT.read_bytes(), prompt="hello", seed=3) as session:
                        frames = np.concatenate([block.frames for block in session.stream(self._spoken())])
                except SessionRefused as refused:  # the places of the sessions before are not free yet
                    if refused.code is ErrorCode.UNAVAILABLE:
                        continue
                    raise
                assert np.array_equal(frames, self.expected), "wrong frames"
                self.rounds += 1
        except BaseException as error:
            self.wrong = error

    def _spoken(self) -> Iterator[Array]:
        for start in range(0, self.speech.size, BLOCK_SAMPLES):
            yield self.speech[start : start + BLOCK_SAMPLES]
            time.sleep(BLOCK_S)


@contextmanager
def neighbour(url: str, speech: Array, expected: Array) -> Iterator[Neighbour]:
    beside = Neighbour(url, speech, expected)
    thread = threading.Thread(target=beside.run)
    thread.start()
    try:
        yield beside
    finally:
        beside.over.set()
        thread.join()
    if beside.wrong is not None:
        raise beside.wrong
    assert beside.rounds > 0
