"""Processes that are alive but do not work, and deaths that coincide, on real servers: sessions are told, and all comes
back."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from live_avatar.arrays import Array
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.serving import gateway_process, metrics, supervisor
from live_avatar.serving.server import TritonServer, serving
from live_avatar.serving.server_options import ServerOptions
from live_avatar.serving.supervisor import living_stages
from live_avatar_client import AvatarError, AvatarSession, SessionFailed
from live_avatar_client.status import server_status
from tests.cli.support import wait_until
from tests.serving.raw import BLOCK, NOTHING, raw_session
from tests.serving.support import assert_every_slot_serves, bystander, scrape, spoken

ANSWER_S = 15.0
"""More than a block takes on a busy machine."""


@pytest.fixture(scope="module")
def strict(artifacts: Artifacts) -> Iterator[TritonServer]:
    options = ServerOptions(artifacts.folder, max_sessions=2, answer_seconds=ANSWER_S, share_avatars=True)
    with serving(options.on_free_ports()) as running:
        yield running


def process_of(server: TritonServer, stage: str) -> int:
    return living_stages(server.process.pid)[stage]


def wait_restarted(server: TritonServer, stage: str, before: int) -> None:
    wait_until(lambda: not server.gateway.is_ready)
    wait_until(lambda: server.gateway.is_ready)
    assert process_of(server, stage) != before


@pytest.mark.parametrize("stage", ["dit_step_2", pytest.param("rolling_sink", marks=pytest.mark.slow)])
def test_a_stopped_stage_is_started_again_and_its_callers_are_told(
    strict: TritonServer, picture: bytes, speech: Array, expected: Array, stage: str
):
    before = process_of(strict, stage)
    with AvatarSession(strict.options.url, image=picture, answer_timeout_s=60.0) as session:
        spoken(session, speech[:7680])
        os.kill(before, signal.SIGSTOP)
        session.send(np.tile(speech[:7680], 7))
        session.end()
        with pytest.raises(SessionFailed, match=r"(open|start) a new session"):
            list(session)
    wait_restarted(strict, stage, before)
    assert scrape(strict)[metrics.PIPE_BLOCKS.name] == 0, "places of blocks that were never answered"
    assert_every_slot_serves(strict, picture, speech, expected)


@pytest.mark.slow
def test_a_stopped_encoder_fails_new_avatars_alone(
    strict: TritonServer, picture: bytes, speech: Array, expected: Array
):
    before = process_of(strict, "avatar_encoder")
    with bystander(strict.options.url, picture, speech, expected):
        os.kill(before, signal.SIGSTOP)
        with raw_session(strict.options.url) as raw:
            error = raw.ask(NOTHING, picture, b"never encoded", start=True)
            assert re.search("has not encoded the picture|avatar_encoder (of the server )?has stopped", error), error
        wait_restarted(strict, "avatar_encoder", before)
        with raw_session(strict.options.url) as raw:
            assert not isinstance(raw.ask(NOTHING, picture, b"encoded again", start=True), str)


@pytest.mark.slow
def test_a_session_that_triton_does_not_answer_is_told(
    strict: TritonServer, picture: bytes, speech: Array, expected: Array
):
    """No stage is stuck, so the gateway's own deadline ends it."""
    with raw_session(strict.options.url) as raw:
        raw.ask(BLOCK, picture, start=True)
        try:
            os.kill(strict.process.pid, signal.SIGSTOP)
            error = f"[FAILED] the server has not answered a request of session {raw.session} for {ANSWER_S:g} s; start"
            assert raw.ask(BLOCK).startswith(error)
        finally:
            os.kill(strict.process.pid, signal.SIGCONT)
    wait_until(lambda: scrape(strict)[metrics.SESSIONS_LIVE.name] == 0)
    assert_every_slot_serves(strict, picture, speech, expected)


@pytest.mark.slow
def test_a_stage_that_does_not_finish_a_request_is_started_again(artifacts: Artifacts, picture: bytes):
    """Each stage sleeps for a minute with a block: the process is alive, and its other threads run."""
    options = ServerOptions(artifacts.folder, answer_seconds=4.0, stage_floor_s=60.0).on_free_ports()
    with serving(options) as server, raw_session(options.url) as raw:
        before = living_stages(server.process.pid)
        raw.ask(NOTHING, picture, start=True)
        assert re.search("(open|start) a new session", raw.ask(BLOCK))
        wait_restarted(server, "conditioning", before["conditioning"])
        after = living_stages(server.process.pid)
        assert {stage for stage in before if before[stage] != after[stage]} == {"conditioning"}


@pytest.mark.slow
def test_a_stopped_gateway_is_not_ready_and_is_started_again(
    artifacts: Artifacts, picture: bytes, speech: Array, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(gateway_process, "REPORT_LIMIT_S", 3.0)
    monkeypatch.setattr(supervisor, "GATEWAY_LIMIT_S", 8.0)
    options = ServerOptions(artifacts.folder).on_free_ports()
    with serving(options) as server:
        before = server.gateway.process_id
        with AvatarSession(options.url, image=picture) as session:
            spoken(session, speech[:7680])
            os.kill(before, signal.SIGSTOP)
            wait_until(lambda: not server.gateway.is_ready)
            assert server.gateway.process_id == before, "the health port must tell before anything is done"
            with pytest.raises(AvatarError):
                list(session.stream([speech[: 4 * 7680]]))
        wait_until(lambda: server.gateway.process_id != before and server.gateway.is_ready)
        with AvatarSession(options.url, image=picture) as session:
            assert len(spoken(session, speech[:7680]).frames) == 12


@pytest.mark.slow
def test_a_gateway_that_dies_while_a_stage_is_loaded_comes_back_at_once_and_is_not_ready(
    artifacts: Artifacts, picture: bytes, speech: Array, monkeypatch: pytest.MonkeyPatch
):
    loads, load = threading.Event(), supervisor.Admin.load

    def slow(self: supervisor.Admin, model: str, limit_s: float = 10.0) -> bool:
        assert loads.wait(120.0)
        return load(self, model, limit_s)

    options = ServerOptions(artifacts.folder).on_free_ports()
    with serving(options) as server:
        monkeypatch.setattr(supervisor.Admin, "load", slow)
        before, stage = server.gateway.process_id, process_of(server, "dit_step_3")
        os.kill(stage, signal.SIGKILL)
        wait_until(lambda: not server.gateway.is_ready)
        os.kill(before, signal.SIGKILL)
        wait_until(lambda: server.gateway.process_id != before and _answers(options.url))
        with raw_session(options.url) as raw:
            for _ in range(20):
                assert "a stage of this server is being started" in raw.ask(NOTHING, picture, start=True)
        loads.set()
        wait_until(lambda: server.gateway.is_ready)
        with AvatarSession(options.url, image=picture) as session:
            assert len(spoken(session, speech[:7680]).frames) == 12


def _answers(url: str) -> bool:
    try:
        return server_status(url).live
    except AvatarError:
        return False


@pytest.mark.slow
def test_a_drain_while_the_gateway_is_away_holds_when_it_is_back(artifacts: Artifacts):
    options = ServerOptions(artifacts.folder).on_free_ports()
    with serving(options) as server:
        before = server.gateway.process_id
        os.kill(before, signal.SIGKILL)
        server.drain(0.1)
        wait_until(lambda: server.gateway.process_id != before and _answers(options.url))
        for _ in range(5):
            status = server_status(options.url)
            assert (status.ready, status.draining) == (False, True)
