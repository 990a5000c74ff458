"""The tiny decoder from the command line to the frames that Triton serves; its weights are random."""

from __future__ import annotations

import numpy as np
import pytest

from live_avatar.arrays import Array
from live_avatar.graphs.artifacts import Artifacts, load_artifacts
from live_avatar.pipeline.generator import Generator
from live_avatar.runtime.onnx_runtime import OnnxRuntime
from live_avatar.runtime.torch_runtime import TorchRuntime
from live_avatar.serving.server import serving
from live_avatar.serving.server_options import ServerOptions
from live_avatar.weights.checkpoint import open_checkpoint
from live_avatar.weights.tiny_decoder import with_tiny_decoder
from tests.cli.support import invoke
from tests.serving.conftest import generated
from tests.serving.support import frames_of, received
from tests.support.repository import ROOT
from tests.tolerances import OTHER_LEVEL_SHARE

pytestmark = pytest.mark.slow

FILE = ROOT / "tests/golden/data/tae_weights.safetensors"


@pytest.fixture(scope="module")
def softer(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    folder = tmp_path_factory.mktemp("artifacts") / "softer"
    result = invoke("export", "--preset", "tiny", "--decoder", FILE, "--output", folder)
    assert result.exit_code == 0, result.stderr
    return load_artifacts(folder)


@pytest.fixture(scope="module")
def frames(softer: Artifacts, picture: bytes, speech: Array) -> Array:
    return generated(Generator(OnnxRuntime(softer)), picture, "hello", 3, speech)


def test_the_manifest_says_which_decoder(softer: Artifacts, artifacts: Artifacts) -> None:
    assert softer.manifest["weights"]["tae"]["files"].keys() == {FILE.name}
    assert softer.fingerprint != artifacts.fingerprint
    assert softer.contracts["dit"] == artifacts.contracts["dit"]


def test_the_server_serves_its_frames(softer: Artifacts, picture: bytes, speech: Array, frames: Array) -> None:
    options = ServerOptions(softer.folder).on_free_ports()
    with serving(options):
        assert np.array_equal(frames_of(received(options.url, picture, speech)), frames)


def test_the_frames_are_torchs_and_none_of_the_vaes(
    picture: bytes, speech: Array, frames: Array, expected: Array
) -> None:
    runtime = TorchRuntime(with_tiny_decoder(open_checkpoint(), FILE))
    difference = np.abs(generated(Generator(runtime), picture, "hello", 3, speech).astype(int) - frames)
    assert difference.max() <= 1
    assert (difference > 0).mean() <= OTHER_LEVEL_SHARE
    assert np.abs(expected.astype(int) - frames).mean() > 10
