"""An FP8 KV cache behind the stages: a pipe, and Triton, make the frames of `generate`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from live_avatar.arrays import Array
from live_avatar.graphs.artifacts import Artifacts, load_artifacts
from live_avatar.pipeline.generator import Generator, cut_blocks
from live_avatar.runtime.onnx_runtime import OnnxRuntime
from live_avatar.serving.server import serving
from live_avatar.serving.server_options import ServerOptions
from tests.cli.support import invoke
from tests.export.conftest import FP8_CACHE
from tests.serving.conftest import generated
from tests.serving.pipe import Pipe, avatar_tensors
from tests.serving.support import frames_of, received
from tests.support.artifacts import exported_once


def test_stages_in_a_row_make_the_generators_frames(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, picture: bytes, speech: Array
) -> None:
    """Two sessions in turns, for eight blocks: rings wrap, and the sink is replaced."""
    runtime = OnnxRuntime(exported_once(tmp_path_factory, FP8_CACHE), warm=True)
    pipe, opening = Pipe(runtime, tmp_path), avatar_tensors(runtime, picture, "hello")
    sessions = {5: speech, 6: speech[::-1]}
    frames: dict[int, list[Array]] = {session: [] for session in sessions}
    for block in range(8):
        for session, said in sessions.items():
            samples = [*cut_blocks(said, FP8_CACHE.stream)][block]
            given = opening if block == 0 else {}
            frames[session].append(pipe.run(samples, start=block == 0, session=session, **given))
    for session, said in sessions.items():
        expected = generated(Generator(runtime), picture, "hello", 3, said)
        assert np.array_equal(np.concatenate(frames[session])[: len(expected)], expected)


@pytest.fixture(scope="module")
def fp8_cache(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    folder = tmp_path_factory.mktemp("artifacts") / "fp8"
    result = invoke("export", "--preset", "tiny", "--kv-cache-dtype", "fp8", "--output", folder)
    assert result.exit_code == 0, result.stderr
    return load_artifacts(folder)


@pytest.mark.slow
def test_the_server_serves_the_generators_frames(
    fp8_cache: Artifacts, artifacts: Artifacts, picture: bytes, speech: Array, expected: Array
) -> None:
    """Close to those of the same weights without the option, and other ones."""
    assert fp8_cache.fingerprint != artifacts.fingerprint
    frames = generated(Generator(OnnxRuntime(fp8_cache)), picture, "hello", 3, speech)
    options = ServerOptions(fp8_cache.folder).on_free_ports()
    with serving(options):
        assert np.array_equal(frames_of(received(options.url, picture, speech)), frames)
    assert frames.shape == expected.shape
    difference = np.abs(frames.astype(int) - expected)
    assert 0 < difference.mean() < 1
