"""Weights of the same size in the place of those that were exported are never served."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from live_avatar.arrays import Array
from live_avatar.errors import ServerError
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.serving.server import TritonServer, serving
from live_avatar.serving.server_options import ServerOptions
from live_avatar_client.errors import AvatarError
from tests.cli.support import wait_until
from tests.serving.support import frames_of, received

LIMIT_S = 180.0
CHANGED = r"dit\.weights has digest [0-9a-f]{12}, expected [0-9a-f]{12} as in manifest\.json, so it was changed after"


@pytest.fixture
def folder(artifacts: Artifacts, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(artifacts.folder, tmp_path / "tiny")
    return tmp_path / "tiny"


def replace_weights(folder: Path) -> bytes:
    """Makes a part of the transformer's weights larger by half; gives what stood there."""
    path = folder / "dit.weights"
    before = path.read_bytes()
    weights = np.frombuffer(bytearray(before), np.float32)
    weights[1000:200_000] *= 1.5
    put(path, weights.tobytes())
    return before


def put(path: Path, data: bytes) -> None:
    path.with_suffix(".new").write_bytes(data)
    path.with_suffix(".new").replace(path)


def kill(server: TritonServer, stage: str) -> None:
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = command.read_text().split("\0")
            parent = command.with_name("stat").read_text().rpartition(")")[2].split()[1]
        except OSError:  # it ended meanwhile
            continue
        if int(parent) == server.process.pid and any(word.endswith(f"/{stage}/1/model.py") for word in words):
            os.kill(int(command.parent.name), signal.SIGKILL)


@pytest.mark.slow
def test_a_stage_does_not_come_back_with_other_artifacts(
    folder: Path, picture: bytes, speech: Array, expected: Array
) -> None:
    """They are whole in themselves, but not what the server, its provenance and its other stages are."""
    lines: list[str] = []
    with serving(ServerOptions(folder).on_free_ports(), lines.append) as server:
        manifest = folder / "manifest.json"
        before = manifest.read_bytes()
        changed = json.loads(before)
        changed["preset"]["stream"]["lookahead_ms"] = 200
        put(manifest, json.dumps(changed).encode())
        kill(server, "dit_step_2")
        wait_until(lambda: "is not what this server was started with: its manifest is" in "\n".join(lines))
        put(manifest, before)
        assert np.array_equal(frames_when_it_is_back(server, picture, speech), expected)


def test_a_server_does_not_start_with_them(folder: Path) -> None:
    replace_weights(folder)
    with pytest.raises(ServerError, match=CHANGED), serving(ServerOptions(folder).on_free_ports()):
        pytest.fail("it serves them")


@pytest.mark.slow
def test_a_stage_does_not_come_back_with_them(folder: Path, picture: bytes, speech: Array, expected: Array) -> None:
    lines: list[str] = []
    with serving(ServerOptions(folder).on_free_ports(), lines.append) as server:
        before = replace_weights(folder)
        assert np.array_equal(frames_of(received(server.options.url, picture, speech)), expected)
        kill(server, "dit_step_2")
        deadline_s = time.monotonic() + LIMIT_S
        while not re.search(CHANGED, "\n".join(lines)) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        assert re.search(CHANGED, "\n".join(lines))
        with pytest.raises(AvatarError):
            received(server.options.url, picture, speech)
        put(folder / "dit.weights", before)
        assert np.array_equal(frames_when_it_is_back(server, picture, speech), expected)


def frames_when_it_is_back(server: TritonServer, picture: bytes, speech: Array) -> Array:
    deadline_s = time.monotonic() + LIMIT_S
    while True:
        try:
            return frames_of(received(server.options.url, picture, speech))
        except AvatarError:
            if time.monotonic() > deadline_s:
                raise
        time.sleep(0.5)
