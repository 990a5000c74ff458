"""Stages that are told to take turns never work at the same time, and the others do not wait for them."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import pytest

from live_avatar.graphs.artifacts import Artifacts
from live_avatar.serving.server import serving
from live_avatar.serving.server_options import ServerOptions
from live_avatar.serving.trace import read_trace
from live_avatar.serving.turns import turn_of, turns_value
from tests.conftest import noise_speech
from tests.serving.support import received

SHARED = ("dit_step_4", "vae_decoder")


def test_only_named_stages_take_turns(tmp_path: Path) -> None:
    value = turns_value(tmp_path / "turn", SHARED)
    assert turn_of("dit_step_1", value) is nullcontext
    assert turn_of("vae_decoder", None) is nullcontext
    held: list[float] = []

    def work() -> None:
        with turn_of("dit_step_4", value)():
            held.append(time.monotonic())

    with turn_of("vae_decoder", value)():
        other = threading.Thread(target=work)
        other.start()
        time.sleep(0.2)
        assert not held
        let_go = time.monotonic()
    other.join()
    assert held[0] >= let_go


@pytest.mark.slow
def test_on_a_server(artifacts: Artifacts, picture: bytes, tmp_path: Path) -> None:
    options = ServerOptions(artifacts.folder, trace=tmp_path, stage_floor_s=0.12, turns=SHARED).on_free_ports()
    with serving(options) as server:
        received(server.options.url, picture, noise_speech(2.4))
    busy = [i for i in read_trace(tmp_path) if i.stage in SHARED]
    assert len(busy) == 10
    assert all(first.end_s <= second.start_s for first, second in pairwise(busy))
