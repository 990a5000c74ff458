"""What many tests share: the tiny preset's networks, its artifacts, a server of them, and a picture and speech.

Exporting takes about 40 s, so a run exports once; tests must not change what they get from here.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

# Several workers, servers and programs run at once. Threads that wait for each other's turn would take most of the
# processors' time. The libraries read this when they are loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

from live_avatar import interrupts
from live_avatar.arrays import Array
from live_avatar.assets import PORTRAIT
from live_avatar.config import TINY
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.runtime.onnx_runtime import OnnxGraph, OnnxRuntime
from live_avatar.runtime.torch_runtime import TorchRuntime
from live_avatar.serving.server import TritonServer, serving
from live_avatar.serving.server_options import ServerOptions
from live_avatar.weights.checkpoint import open_checkpoint
from tests.support.artifacts import exported_once
from tests.support.networks import SMALL
from tests.support.speakers import TWO
from tests.support.traces import trace_once

SEED = 7


@pytest.fixture(scope="session", autouse=True)
def _traces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        trace_once(tmp_path_factory, monkeypatch)
        yield


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """What a test does with signals ends with it: a command that was interrupted ignores further ones.

    Ctrl-C interrupts tests also where a shell has started them in the background, and so ignoring it.
    """
    before = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def small_runtime() -> TorchRuntime:
    return TorchRuntime(open_checkpoint(SMALL))


@pytest.fixture(scope="session")
def torch_runtime() -> TorchRuntime:
    return TorchRuntime(open_checkpoint(TINY))


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """The tiny preset, exported."""
    return exported_once(tmp_path_factory, TINY)


@pytest.fixture(scope="session")
def artifacts_of_two(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """The tiny preset for two speakers in a picture that is twice as wide."""
    return exported_once(tmp_path_factory, TWO)


class KeptGraphs(OnnxRuntime):
    """Loads each graph once: graphs have no state, and many tests run the same ones."""

    def __init__(self, artifacts: Artifacts) -> None:
        super().__init__(artifacts)
        self._graphs: dict[str, OnnxGraph] = {}

    def graph(self, component: str) -> OnnxGraph:
        if component not in self._graphs:
            self._graphs[component] = super().graph(component)
        return self._graphs[component]


@pytest.fixture(scope="session")
def onnx_runtime(artifacts: Artifacts) -> OnnxRuntime:
    return KeptGraphs(artifacts)


@pytest.fixture(scope="session")
def server(artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """For all tests that do not break it. Its sessions share their avatars, though each has its own connection."""
    trace = tmp_path_factory.mktemp("trace")
    options = ServerOptions(artifacts.folder, trace=trace, share_avatars=True, starts_per_minute=100_000)
    with serving(options.on_free_ports()) as running:
        yield running


@pytest.fixture(scope="session")
def picture() -> bytes:
    """An encoded PNG."""
    return PORTRAIT.read_bytes()


def noise_speech(seconds: float, seed: int = SEED) -> Array:
    """Loud noise, int16 at 16 kHz: every block differs from every other."""
    generator = np.random.default_rng(seed)
    return (generator.standard_normal(round(seconds * 16_000)) * 3000).astype(np.int16)
