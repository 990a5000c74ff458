"""Profiles on the real server: every split of the steps serves what `generate` makes; what does not fit is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from live_avatar.arrays import Array
from live_avatar.errors import LiveAvatarError
from live_avatar.graphs.artifacts import Artifacts, load_artifacts
from live_avatar.pipeline.generator import Generator
from live_avatar.runtime.onnx_runtime import OnnxRuntime
from live_avatar.serving.metrics import BLOCKS as BLOCKS_DONE
from live_avatar.serving.metrics import STEPS
from live_avatar.serving.profiles import load_profile
from live_avatar.serving.server import TritonServer, serving
from live_avatar.serving.server_options import ServerOptions
from live_avatar.serving.steps import read_steps
from live_avatar.serving.supervisor import living_stages
from live_avatar.serving.trace import read_trace
from live_avatar_client.status import server_status
from tests.cli.support import assert_refused, invoke
from tests.serving.conftest import generated
from tests.serving.support import frames_of, frames_until, received, scrape, series, speech_of

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


@pytest.mark.slow
def test_the_manifest_carries_the_schedule(three_steps: Artifacts, artifacts: Artifacts) -> None:
    released = artifacts.preset.with_stream(steps=3, sigmas=(1.0, 0.857692301273346, 0.602150559425354, 0.0))
    assert three_steps.preset == released
    assert artifacts.contracts == three_steps.contracts


@pytest.mark.slow
def test_three_steps_in_the_pipe_equal_three_steps_in_sequence(
    three_steps: Artifacts, short_server: TritonServer, picture: bytes, speech: Array, expected: Array
) -> None:
    frames = generated(Generator(OnnxRuntime(three_steps)), picture, "hello", 3, speech)
    assert np.array_equal(frames_of(received(short_server.options.url, picture, speech)), frames)
    assert not np.array_equal(frames, expected), "the fourth step moves something"
    assert short_server.options.trace is not None
    stages = {interval.stage for interval in read_trace(short_server.options.trace)}
    assert stages == set(CHAIN)


@pytest.mark.slow
def test_a_profile_loads_its_models_alone_and_no_client_can_change_that(short_server: TritonServer) -> None:
    assert living_stages(short_server.process.pid).keys() == {*CHAIN, "rolling_sink", "avatar_encoder"}
    assert_no_client_can_change_the_models(short_server.options.url)


def assert_no_client_can_change_the_models(url: str) -> None:
    with InferenceServerClient(url) as client:
        for forbidden in (
            client.get_model_repository_index,
            lambda: client.unload_model("dit_step_2"),
            lambda: client.load_model("dit_step_4"),
        ):
            with pytest.raises(InferenceServerException, match="UNIMPLEMENTED"):
                forbidden()
        assert client.is_model_ready("live_avatar")


SPLITS = {
    "one": ("1-4",),
    "two": ("1-2", "3-4"),
    "three": ("1", "2-3", "4"),
}
"""Steps of every process; four processes are the profile `cpu`, which `test_equality` serves."""
BLOCKS = 6  # the sink is replaced at block 5


@pytest.mark.parametrize("name", ["two", *(pytest.param(name, marks=pytest.mark.slow) for name in ("one", "three"))])
def test_every_split_of_the_steps_serves_the_same_frames(
    name: str, artifacts: Artifacts, tmp_path: Path, picture: bytes, speech: Array, expected: Array
) -> None:
    profile = tmp_path / f"{name}.toml"
    ends = [f'{stage} = "cpu"' for stage in ("conditioning", "avatar_encoder", "decoder")]
    steps = [f'{steps} = "cpu"' for steps in SPLITS[name]]
    profile.write_text("\n".join(["max_sessions = 2", "known_avatars = 1", *ends, "[steps]", *steps]))
    trace = tmp_path / "trace"
    options = ServerOptions(artifacts.folder, str(profile), trace=trace).on_free_ports()
    stages = [place.name for place in load_profile(str(profile)).chain]
    with serving(options) as server:
        assert living_stages(server.process.pid).keys() == {*stages, "rolling_sink", "avatar_encoder"}
        assert_no_client_can_change_the_models(server.options.url)
        frames = frames_of(received(server.options.url, picture, speech_of(speech, 0, BLOCKS)))
        assert np.array_equal(frames, frames_until(expected, BLOCKS))
        numbers = scrape(server)
        assert server_status(server.options.url).profile == name
    assert {interval.stage for interval in read_trace(trace)} == set(stages)
    assert numbers["live_avatar_sink_updates_total"] == 1
    denoising = [stage for stage in stages if stage.startswith("dit_")]
    assert [numbers[series(BLOCKS_DONE, stage)] for stage in denoising] == [BLOCKS] * len(SPLITS[name])
    assert [numbers[series(STEPS, stage)] for stage in denoising] == [len(read_steps(text)) for text in SPLITS[name]]


def refusal(folder: Path, profile: str) -> str:
    with pytest.raises(LiveAvatarError) as caught, serving(ServerOptions(folder, profile).on_free_ports()):
        pass
    return str(caught.value)


def test_artifacts_of_another_number_of_steps_are_refused(artifacts: Artifacts, three_steps: Artifacts) -> None:
    assert refusal(artifacts.folder, "cpu-3-steps") == (
        f"profile cpu-3-steps serves 3 denoising steps, but {artifacts.folder} was exported with 4; choose --profile "
        "cpu or gpux1 or gpux2 or gpux3 or gpux5, or export with 3 (`live-avatar export --help`)."
    )
    for profile in ("cpu", "gpux5"):
        assert refusal(three_steps.folder, profile) == (
            f"profile {profile} serves 4 denoising steps, but {three_steps.folder} was exported with 3; choose "
            "--profile cpu-3-steps or gpux4, or export with 4 (`live-avatar export --help`)."
        )


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="a machine with GPUs may serve the profile")
@pytest.mark.parametrize("name", ["gpux5", "h800x5"])
def test_a_profile_of_gpus_without_gpus_is_one_sentence(artifacts: Artifacts, name: str) -> None:
    assert_refused(
        invoke("serve", "--artifacts", artifacts.folder, "--profile", name),
        "profile gpux5 needs GPU 0, 1, 2, 3, 4, but NVIDIA's driver shows none on this machine; serve where there are "
        "enough of them, or choose another --profile.",
    )


def test_a_wrong_profile_is_one_sentence(artifacts: Artifacts, tmp_path: Path) -> None:
    profile = tmp_path / "mine.toml"
    assert_refused(
        invoke("serve", "--artifacts", artifacts.folder, "--profile", profile),
        f"cannot read the profile {profile} (No such file or directory); give an existing file, or one of cpu, ",
    )
    profile.write_text("max_sessions = 4")
    assert_refused(
        invoke("serve", "--artifacts", artifacts.folder, "--profile", profile),
        f"profile {profile}: 'known_avatars' is missing; a profile has max_sessions, ",
    )
