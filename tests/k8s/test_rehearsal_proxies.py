"""Two servers behind a real HAProxy, and a real nginx with TLS: where sessions go, and what a drain does to them.

Every frame is compared with the generator's. What a cluster adds (endpoints, kube-proxy, a gateway) is not here.
"""

from __future__ import annotations

import io
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from live_avatar.arrays import Array
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.pipeline.generator import Generator
from live_avatar.runtime.onnx_runtime import OnnxRuntime
from live_avatar.serving import metrics
from live_avatar.serving.server_options import free_ports
from live_avatar_client import AvatarSession, Block, SessionRefused
from live_avatar_client.protocol import ErrorCode
from tests.conftest import noise_speech
from tests.k8s.rehearsal import HAProxy, Nginx, Proxy, Server, started, two_servers
from tests.serving.conftest import generated
from tests.serving.support import frames_of, frames_until, series, speech_of, spoken

pytestmark = pytest.mark.k8s

SESSIONS = 2
BLOCKS = 14
BLOCK_S = 0.48
DRAIN_S = 60
ATTEMPTS = 20
HEARD_S = 6.0
"""Until a proxy has heard that a server drains: the check of haproxy.cfg comes every 0.5 s, and may take 5 s."""
LATE_VISITS = 3
ADMITTED, FRAMES, LIVE = (series(m) for m in (metrics.SESSIONS_ADMITTED, metrics.FRAMES, metrics.SESSIONS_LIVE))


@dataclass
class Site:
    """The first server is the one that drains."""

    proxy: Proxy
    process: subprocess.Popen[bytes]
    first: Server
    second: Server

    def counts(self, metric: str) -> tuple[int, int]:
        return int(self.first.numbers()[metric]), int(self.second.numbers()[metric])


@pytest.fixture(scope="module", params=[HAProxy, Nginx], ids=["haproxy", "nginx"])
def site(
    request: pytest.FixtureRequest, artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    limits = ("--max-sessions", SESSIONS, "--drain-seconds", DRAIN_S)
    with two_servers(folder, artifacts, *limits) as servers:
        proxy = request.param(folder, free_ports(1)[0], servers)
        with started(folder / "proxy.log", *proxy.command, port=proxy.port) as process:
            yield Site(proxy, process, *servers)


@pytest.fixture(scope="module")
def large_picture() -> bytes:
    """More than a megabyte: proxies that limit the body of a request would not let it through."""
    noise = np.random.default_rng(1).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    assert file.tell() > 2**20
    return file.getvalue()


@pytest.fixture(scope="module")
def speech() -> Array:
    return noise_speech(BLOCKS * BLOCK_S)


@pytest.fixture(scope="module")
def expected(onnx_runtime: OnnxRuntime, large_picture: bytes, speech: Array) -> Array:
    return generated(Generator(onnx_runtime), large_picture, "hello", 3, speech)


Open = Callable[[], AvatarSession]


@pytest.fixture
def open_session(site: Site, large_picture: bytes) -> Open:
    def opened() -> AvatarSession:
        return AvatarSession(site.proxy.url, image=large_picture, prompt="hello", seed=3, tls=site.proxy.tls)

    return opened


def test_new_sessions_go_where_slots_are_free_and_stay_there(
    site: Site, open_session: Open, speech: Array, expected: Array
) -> None:
    made_before = site.counts(FRAMES)
    with ExitStack() as stack:

        def begin() -> tuple[AvatarSession, Block, int]:
            """A session with its first block, and its server's number."""
            before = site.counts(ADMITTED)
            session = stack.enter_context(open_session())
            first = spoken(session, speech_of(speech, 0, 1))
            grown = [now - then for now, then in zip(site.counts(ADMITTED), before, strict=True)]
            assert sorted(grown) == [0, 1]
            return session, first, grown.index(1)

        def finish(session: AvatarSession, first: Block) -> None:
            session.send(speech_of(speech, 1, 4))
            session.end()
            assert np.array_equal(frames_of([first, *session]), frames_until(expected, 4))

        live = [begin() for _ in range(2 * SESSIONS)]
        assert site.counts(LIVE) == (SESSIONS, SESSIONS)
        with open_session() as one_too_many, pytest.raises(SessionRefused, match="sessions of this server") as refusal:
            spoken(one_too_many, speech_of(speech, 0, 1))
        assert refusal.value.code is ErrorCode.UNAVAILABLE
        for session, first, server in live:
            if server == 0:
                finish(session, first)
                session.close()
        again = [begin() for _ in range(SESSIONS)]
        assert [server for _, _, server in again] == [0] * SESSIONS
        for session, first, _ in [entry for entry in live if entry[2] == 1] + again:
            finish(session, first)
    made = [now - then for now, then in zip(site.counts(FRAMES), made_before, strict=True)]
    assert made == [len(frames_until(expected, 4)) * SESSIONS * times for times in (2, 1)]


def test_a_drain_loses_no_frame_of_a_live_session(
    site: Site, open_session: Open, speech: Array, expected: Array
) -> None:
    """One speaks on each server in real time; the first goes down, and others come before the last block is said."""
    visited = threading.Event()

    def in_real_time() -> Iterator[Array]:
        for number in range(BLOCKS):
            time.sleep(BLOCK_S)
            if number == BLOCKS - 1:
                visited.wait()
            yield speech_of(speech, number, number + 1)

    def speak() -> Array:
        with open_session() as session:
            return frames_of(list(session.stream(in_real_time())))

    first_admitted, second_admitted = site.counts(ADMITTED)
    with ThreadPoolExecutor(3) as threads, ExitStack() as stack:
        stack.callback(visited.set)
        speaking = [threads.submit(speak) for _ in range(2)]
        # A session has its place before its avatar is made, and is admitted after it.
        while site.counts(ADMITTED) != (first_admitted + 1, second_admitted + 1):
            assert not any(session.done() for session in speaking)
            time.sleep(0.05)
        went = threads.submit(site.first.running.end, signal.SIGTERM)
        site.proxy.take_out_first(site.process)
        _, admitted = site.counts(ADMITTED)
        heard_s = time.monotonic() + HEARD_S
        early: list[int] = []
        late: list[int] = []
        while len(late) < LATE_VISITS:
            visits = late if time.monotonic() > heard_s else early
            visits.append(come(open_session, speech, expected))
            assert site.second.numbers()[ADMITTED] == admitted + len(early) + len(late)
        visited.set()
        for session in speaking:
            assert np.array_equal(session.result(), expected)
        code, said = went.result()
    assert code == 0, said
    assert sum(late) == 0, f"refused {late} times although the proxy had heard, and {early} times before"
    assert come(open_session, speech, expected) == 0


def come(open_session: Open, speech: Array, expected: Array) -> int:
    """A short session, opened again as long as it is refused; how often it was."""
    for attempt in range(ATTEMPTS):
        try:
            with open_session() as session:
                first = spoken(session, speech_of(speech, 0, 1))
                session.end()
                assert np.array_equal(frames_of([first, *session]), frames_until(expected, 1))
                return attempt
        except SessionRefused as refusal:
            if refusal.code is not ErrorCode.UNAVAILABLE:
                raise
            time.sleep(0.05)
    raise AssertionError(f"refused {ATTEMPTS} times")
