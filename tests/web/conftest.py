"""A page in front of one real Triton server that has two places."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from live_avatar.assets import PORTRAITS
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.serving.server import TritonServer, serving
from live_avatar.serving.server_options import ServerOptions
from live_avatar_client.web.options import WebOptions
from perf.page import page_of

PLACES = 2


@pytest.fixture(scope="session")
def server(artifacts: Artifacts) -> Iterator[TritonServer]:
    options = ServerOptions(
        artifacts.folder, max_sessions=PLACES, share_avatars=True, starts_per_minute=100_000
    ).on_free_ports()
    with serving(options) as running:
        yield running


@pytest.fixture(scope="session")
def page(server: TritonServer) -> Iterator[str]:
    """Address of the page."""
    with page_of(WebOptions(server.options.url, port=0, portraits=PORTRAITS)) as address:
        yield address
