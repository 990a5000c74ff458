"""The committed model repository in a Triton that no `live-avatar serve` has started: the pipe alone."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from live_avatar.arrays import Array
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.serving import server
from live_avatar.serving.server_options import ServerOptions
from live_avatar_client.protocol import FRAMES_PER_BLOCK
from tests.serving.support import frames_until, speech_of

COMMITTED = Path(__file__).parents[2] / "model_repository"
START_LIMIT_S = 300.0


@pytest.fixture
def triton(artifacts: Artifacts, tmp_path: Path) -> Iterator[InferenceServerClient]:
    """Triton with the options that docs/operations.md names; the wheel's needs its backend with this Python's stub."""
    options = ServerOptions(artifacts.folder).on_free_ports()
    bundled = server._bundled()
    if bundled is None:
        pytest.skip("the server is not that of the wheel")
    command = [
        str(bundled / "bin" / "tritonserver"),
        f"--model-repository={COMMITTED}",
        "--disable-auto-complete-config",
        f"--backend-directory={server._backends(tmp_path)}",
        f"--backend-config=python,shm-region-prefix-name={tmp_path.name}-{options.grpc_port}",
        f"--grpc-port={options.grpc_port}",
        "--allow-http=false",
        "--allow-metrics=false",
    ]
    environment = server._environment(options, tmp_path / "control")
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with InferenceServerClient(options.url) as client:
            deadline_s = time.monotonic() + START_LIMIT_S
            while not is_ready(client):
                assert process.poll() is None
                assert time.monotonic() < deadline_s
                time.sleep(0.2)
            yield client
    finally:
        process.terminate()
        process.wait()


def is_ready(client: InferenceServerClient) -> bool:
    try:
        return bool(client.is_server_ready() and client.is_model_ready("live_avatar"))
    except InferenceServerException:
        return False


def tensor(name: str, array: Array) -> InferInput:
    made = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    made.set_data_from_numpy(array)
    return made


@pytest.mark.slow
def test_the_committed_repository_runs_in_a_plain_triton(
    triton: InferenceServerClient, opening: dict[str, Array], speech: Array, expected: Array
) -> None:
    frames = []
    for block in range(2):
        inputs = {"AUDIO": speech_of(speech, block, block + 1)} | (opening if block == 0 else {})
        answer = triton.infer(
            "live_avatar",
            [tensor(name, array) for name, array in inputs.items()],
            sequence_id=7,
            sequence_start=block == 0,
            sequence_end=block == 1,
            parameters={"seed": 3},
        )
        frames.append(answer.as_numpy("FRAMES"))
    assert [len(made) for made in frames] == [FRAMES_PER_BLOCK] * 2
    assert np.array_equal(np.concatenate(frames), frames_until(expected, 2))
