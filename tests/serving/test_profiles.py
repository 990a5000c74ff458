"""Profiles on the real server: three steps serve what `generate` makes; what does not fit is refused at the start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from live_avatar.arrays import Array
from live_avatar.errors import ServerError
from live_avatar.graphs.artifacts import Artifacts, load_artifacts
from live_avatar.pipeline.generator import Generator
from live_avatar.runtime.onnx_runtime import OnnxRuntime
from live_avatar.serving.server import TritonServer, serving
from live_avatar.serving.server_options import ServerOptions
from live_avatar.serving.supervisor import living_stages
from live_avatar.serving.trace import read_trace
from tests.cli.support import assert_refused, invoke
from tests.serving.conftest import generated
from tests.serving.support import frames_of, received

CHAIN = ["conditioning", "dit_step_1", "dit_step_2", "dit_step_3", "vae_decoder"]


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """The tiny preset, exported by the command line without the idle step."""
    folder = tmp_path_factory.mktemp("artifacts") / "three"
    result = invoke("export", "--preset", "tiny", "--drop-idle-step", "--output", folder)
    assert result.exit_code == 0, result.stderr
    return load_artifacts(folder)


@pytest.fixture(scope="module")
def short_server(three_steps: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    options = ServerOptions(three_steps.folder, "cpu-3-steps", trace=tmp_path_factory.mktemp("trace"))
    with serving(options.on_free_ports()) as running:
        yield running


def test_the_manifest_carries_the_schedule(three_steps: Artifacts, artifacts: Artifacts) -> None:
    released = artifacts.preset.with_stream(steps=3, sigmas=(1.0, 0.857692301273346, 0.602150559425354, 0.0))
    assert three_steps.preset == released
    assert artifacts.contracts.keys() - three_steps.contracts.keys() == {"dit_step_4"}


def test_three_steps_in_the_pipe_equal_three_steps_in_sequence(
    three_steps: Artifacts, short_server: TritonServer, picture: bytes, speech: Array, expected: Array
) -> None:
    frames = generated(Generator(OnnxRuntime(three_steps)), picture, "hello", 3, speech)
    assert np.array_equal(frames_of(received(short_server.options.url, picture, speech)), frames)
    assert not np.array_equal(frames, expected), "the fourth step moves something"
    assert short_server.options.trace is not None
    stages = {interval.stage for interval in read_trace(short_server.options.trace)}
    assert stages == set(CHAIN)


def test_a_profile_loads_its_models_alone_and_no_client_can_change_that(short_server: TritonServer) -> None:
    assert living_stages(short_server.process.pid).keys() == {*CHAIN, "rolling_sink", "avatar_encoder"}
    with InferenceServerClient(short_server.options.url) as client:
        for forbidden in (
            client.get_model_repository_index,
            lambda: client.unload_model("dit_step_2"),
            lambda: client.load_model("dit_step_4"),
        ):
            with pytest.raises(InferenceServerException, match="UNIMPLEMENTED"):
                forbidden()
        assert client.is_model_ready("live_avatar")


def refusal(folder: Path, profile: str) -> str:
    with pytest.raises(ServerError) as caught, serving(ServerOptions(folder, profile).on_free_ports()):
        pass
    return str(caught.value)


def test_artifacts_of_another_number_of_steps_are_refused(artifacts: Artifacts, three_steps: Artifacts) -> None:
    assert refusal(artifacts.folder, "cpu-3-steps") == (
        f"profile cpu-3-steps serves 3 denoising steps, but {artifacts.folder} was exported with 4; choose --profile "
        "cpu or h800x1 or h800x5, or export with 3 (`live-avatar export --help`)."
    )
    for profile in ("cpu", "h800x5"):
        assert refusal(three_steps.folder, profile) == (
            f"profile {profile} serves 4 denoising steps, but {three_steps.folder} was exported with 3; choose "
            "--profile cpu-3-steps or h800x4, or export with 4 (`live-avatar export --help`)."
        )


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="a machine with GPUs may serve the profile")
def test_a_profile_of_gpus_without_gpus_is_one_sentence(artifacts: Artifacts) -> None:
    free = ServerOptions(artifacts.folder).on_free_ports()
    ports = ("--grpc-port", free.grpc_port, "--http-port", free.http_port, "--metrics-port", free.metrics_port)
    result = invoke("serve", "--artifacts", artifacts.folder, "--profile", "h800x5", *ports)
    assert_refused(
        result,
        "profile h800x5 needs GPU 0, 1, 2, 3, 4, but Triton sees none on this machine; serve where there are enough of "
        "them, or choose another --profile.",
    )
