"""A slow server, and the oracle to compare servers with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from live_avatar.arrays import Array
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.pipeline.generator import Generator
from live_avatar.runtime.onnx_runtime import OnnxRuntime
from live_avatar.serving.server import TritonServer, serving
from live_avatar.serving.server_options import ServerOptions
from tests.conftest import noise_speech
from tests.serving.pipe import Pipe, avatar_tensors

SECONDS = 3.5  # 8 blocks: the ring wraps, and the sink is replaced at block 5


@pytest.fixture(autouse=True)
def patient_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that leaves waits for the answer to END on a busy machine, too; else it counts as disconnected."""
    monkeypatch.setattr("live_avatar_client.sync.CLOSE_GRACE_S", 60.0)


@pytest.fixture(scope="session")
def url(server: TritonServer) -> str:
    return server.options.url


@pytest.fixture(scope="session")
def slow_server(artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """Every stage takes at least 0.4 s, much more than any takes by itself on a busy machine."""
    options = ServerOptions(artifacts.folder, trace=tmp_path_factory.mktemp("slow-trace"), stage_floor_s=0.4)
    with serving(options.on_free_ports()) as running:
        yield running


@pytest.fixture(scope="session")
def oracle(onnx_runtime: OnnxRuntime) -> Generator:
    """Algorithm 3 on the same graphs, in this process."""
    return Generator(onnx_runtime)


def generated(oracle: Generator, picture: bytes, prompt: str, seed: int, speech: Array) -> Array:
    """All frames of a speech from the oracle."""
    return np.concatenate([block.frames for block in oracle.generate(picture, prompt, seed, speech)])


@pytest.fixture(scope="session")
def speech() -> Array:
    return noise_speech(SECONDS)


@pytest.fixture(scope="session")
def expected(oracle: Generator, picture: bytes, speech: Array) -> Array:
    """Frames of `speech` with prompt "hello" and seed 3."""
    return generated(oracle, picture, "hello", 3, speech)


@pytest.fixture
def pipe(onnx_runtime: OnnxRuntime, tmp_path: Path) -> Pipe:
    return Pipe(onnx_runtime, tmp_path)


@pytest.fixture(scope="session")
def opening(onnx_runtime: OnnxRuntime, picture: bytes) -> dict[str, Array]:
    """Inputs of the request with START that make the frames of `expected`."""
    return avatar_tensors(onnx_runtime, picture, "hello")
