"""A server for the tests that do not end it, and good inputs."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from live_avatar.arrays import Array
from live_avatar.assets import PORTRAIT
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.interrupts import SIGNALS
from live_avatar.serving.server import TritonServer
from tests.cli.support import Running, invoke, write_audio
from tests.conftest import noise_speech

SPEECH_SAMPLES = 40_123  # 6 blocks, the last one padded, and a frame that is not whole


@pytest.fixture(autouse=True)
def handlers_stay() -> Iterator[None]:
    """The command line takes over signals, which is right in a process of its own only."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[Running]]:
    """Whatever a test puts here is ended with it."""
    running: list[Running] = []
    yield running
    for one in running:
        one.kill()


@pytest.fixture(scope="session")
def url(server: TritonServer) -> str:
    return server.options.url


@pytest.fixture(scope="session")
def image() -> Path:
    return PORTRAIT


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with speech.wav, long.wav and short.wav, 10 ms of it."""
    folder = tmp_path_factory.mktemp("inputs")
    speech = noise_speech(60.0) / 32768.0
    write_audio(folder / "speech.wav", speech[:SPEECH_SAMPLES], "pcm_s16le")
    write_audio(folder / "long.wav", speech, "pcm_s16le")
    write_audio(folder / "short.wav", speech[:160], "pcm_s16le")
    return folder


@pytest.fixture(scope="session")
def generated(artifacts: Artifacts, inputs: Path, image: Path) -> tuple[Path, Array]:
    """Folder with the video of speech.wav and its frames, by `generate`, prompt "hello" and seed 3."""
    options = ("--prompt", "hello", "--seed", 3, "--artifacts", artifacts.folder)
    files = ("--output", inputs / "generated.mp4", "--frames-output", inputs / "generated.npy")
    result = invoke("generate", "--audio", inputs / "speech.wav", "--image", image, *files, *options)
    assert result.exit_code == 0, result.stderr
    return inputs, np.load(inputs / "generated.npy")
