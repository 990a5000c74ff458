"""A real server with the tiny avatar, for the tests of the adapters to LiveKit Agents and Pipecat.

These tests have an environment of their own (`make test-integrations`), which has the frameworks and the client, and no
torch. In `.venv`, which has no frameworks, they are left out. The server runs in `.venv`.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = ROOT / ".venv" / "bin" / "live-avatar"
ARTIFACTS = ROOT / "artifacts" / "tiny"
START_S = 240.0

HAVE_FRAMEWORKS = find_spec("livekit") is not None and find_spec("pipecat") is not None

collect_ignore_glob = [] if HAVE_FRAMEWORKS else ["test_*.py"]

# Of the frameworks' own modules.
FOREIGN_WARNINGS = (
    "ignore::DeprecationWarning",
    "ignore::PendingDeprecationWarning",
    "ignore::UserWarning:livekit.*",
    "ignore::UserWarning:pipecat.*",
)


def pytest_configure(config: pytest.Config) -> None:
    if HAVE_FRAMEWORKS:
        for line in FOREIGN_WARNINGS:
            config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session")
def triton() -> Iterator[str]:
    """The address of a real server with the tiny avatar."""
    with _serving() as url:
        yield url


LONGEST_SESSION_S = 8
"""Enough for the start on a busy machine, and less than a speech."""


@pytest.fixture(scope="session")
def impatient_triton() -> Iterator[str]:
    """The address of a real server that ends a session after a few seconds, with an error."""
    with _serving("--longest-session-seconds", str(LONGEST_SESSION_S)) as url:
        yield url


@contextmanager
def _serving(*options: str) -> Iterator[str]:
    ports = _free_ports(3)
    numbers = zip(("--grpc-port", "--http-port", "--metrics-port"), map(str, ports), strict=True)
    command = [str(COMMAND), "serve", "--artifacts", str(ARTIFACTS), *(word for pair in numbers for word in pair)]
    server = subprocess.Popen([*command, *options], env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        _wait_until_ready(server, ports[0])
        yield f"127.0.0.1:{ports[0]}"
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@pytest.fixture(scope="session")
def portrait() -> bytes:
    """The demo's picture."""
    return (ROOT / "live_avatar" / "assets" / "portrait.png").read_bytes()


def _free_ports(count: int) -> list[int]:
    """Different ones, as each is held until all are found; this environment has no `live_avatar`."""
    with ExitStack() as held:
        probes = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(probe.getsockname()[1]) for probe in probes]


def _wait_until_ready(server: subprocess.Popen[bytes], port: int) -> None:
    from live_avatar_client import AvatarError
    from live_avatar_client.status import server_status

    deadline_s = time.monotonic() + START_S
    while True:
        assert server.poll() is None, f"the server has ended with the code {server.returncode}"
        with suppress(AvatarError):
            if server_status(f"127.0.0.1:{port}").ready:
                return
        assert time.monotonic() < deadline_s, f"the server was not ready within {START_S:g} s"
        time.sleep(0.5)
