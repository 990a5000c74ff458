"""A page in front of one real Triton server that has two places, and a browser whose microphone hears a file."""

from __future__ import annotations

import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Playwright, sync_playwright

from live_avatar.arrays import Array
from live_avatar.assets import PORTRAIT, PORTRAITS, SPEECH
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.serving.server import TritonServer, serving
from live_avatar.serving.server_options import ServerOptions
from live_avatar_client.media import read_speech
from live_avatar_client.web.options import WebOptions
from perf.browser import chromium
from perf.page import page_of

PLACES = 2
QUIET_S = 1.5


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


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the microphone hears: the demo's speech after some silence, at 48 kHz as browsers like it."""
    path = tmp_path_factory.mktemp("heard") / "heard.wav"
    speech = read_speech(SPEECH)
    quiet = np.zeros(round(QUIET_S * 16_000), np.int16)
    with wave.open(str(path), "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(16_000)
        writer.writeframes(np.concatenate([quiet, speech, quiet]).astype("<i2").tobytes())
    return path


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as running:
        yield running


@pytest.fixture(scope="module")
def browser(playwright: Playwright, heard: Path) -> Iterator[Browser]:
    with chromium(playwright, heard) as running:
        yield running


@pytest.fixture(scope="module")
def portrait() -> Array:
    return np.asarray(Image.open(PORTRAIT).convert("RGB").resize((96, 96), Image.Resampling.BOX))
