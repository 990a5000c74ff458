"""Frames from Triton are those of the generator, to the bit, however the speech arrives."""

from __future__ import annotations

import io
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from live_avatar.arrays import Array
from live_avatar.graphs.artifacts import Artifacts, load_artifacts
from live_avatar.pipeline.generator import Generator
from live_avatar.runtime.onnx_runtime import OnnxRuntime
from live_avatar.serving.server import serving
from live_avatar.serving.server_options import ServerOptions
from live_avatar_client import AvatarSession
from live_avatar_client.protocol import BLOCK_SAMPLES
from tests.conftest import noise_speech
from tests.serving.conftest import generated
from tests.serving.support import Pacing, at_once, frames_of, received


def slowly(speech: Array) -> Iterator[Array]:
    """A block every 0.2 s: the pipe runs empty in between."""
    for start in range(0, speech.size, BLOCK_SAMPLES):
        time.sleep(0.2)
        yield speech[start : start + BLOCK_SAMPLES]


def with_jitter(speech: Array) -> Iterator[Array]:
    """Chunks of 1 to 6,000 samples with pauses of 0 to 50 ms."""
    generator = np.random.default_rng(5)
    start = 0
    while start < speech.size:
        size = int(generator.integers(1, 6000))
        time.sleep(float(generator.uniform(0, 0.05)))
        yield speech[start : start + size]
        start += size


@pytest.mark.parametrize("pacing", [at_once, slowly, with_jitter])
def test_frames_equal_the_generators(url: str, picture: bytes, speech: Array, expected: Array, pacing: Pacing) -> None:
    blocks = received(url, picture, speech, pacing)
    assert [block.first_frame for block in blocks] == list(range(0, len(expected), 12))
    assert np.array_equal(frames_of(blocks), expected)


@pytest.mark.parametrize("pacing", [at_once, with_jitter])
def test_frames_of_each_latent_equal_the_generators(
    url: str, picture: bytes, speech: Array, expected: Array, pacing: Pacing
) -> None:
    with AvatarSession(url, image=picture, prompt="hello", seed=3, frames_per_response=4) as session:
        blocks = list(session.stream(pacing(speech)))
    assert [block.first_frame for block in blocks] == list(range(0, len(expected), 4))
    assert np.array_equal(frames_of(blocks), expected)


def test_seed_and_prompt_reach_the_model(url: str, picture: bytes, speech: Array, expected: Array) -> None:
    assert not np.array_equal(frames_of(received(url, picture, speech[:BLOCK_SAMPLES], seed=4)), expected[:12])
    with AvatarSession(url, image=picture, prompt="another", seed=3) as session:
        (block,) = session.stream([speech[:BLOCK_SAMPLES]])
    assert not np.array_equal(block.frames, expected[:12])


def test_interleaved_sessions_do_not_meet(url: str, picture: bytes, oracle: Generator) -> None:
    speeches = [noise_speech(2.9, seed) for seed in (11, 12, 13)]
    got: dict[int, Array] = {}

    def run(index: int) -> None:
        got[index] = frames_of(received(url, picture, speeches[index], with_jitter, seed=index))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(speeches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, speech in enumerate(speeches):
        assert np.array_equal(got[index], generated(oracle, picture, "hello", index, speech)), f"session {index}"


@pytest.mark.parametrize(
    ("samples", "frames"), [(1, 1), (160, 1), (640, 1), (641, 2), (BLOCK_SAMPLES, 12), (BLOCK_SAMPLES + 1, 13)]
)
def test_as_many_frames_as_the_speech_needs(url: str, picture: bytes, samples: int, frames: int) -> None:
    speech = noise_speech(1.0)[:samples]
    assert len(frames_of(received(url, picture, speech))) == frames


def test_jpeg_frames_show_the_same_pictures(url: str, picture: bytes, speech: Array, expected: Array) -> None:
    with AvatarSession(url, image=picture, prompt="hello", seed=3, frame_format="jpeg") as session:
        (block,) = session.stream([speech[:BLOCK_SAMPLES]])
    decoded = np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in block.jpegs])
    assert decoded.shape == expected[:12].shape
    assert np.abs(decoded.astype(int) - expected[:12]).mean() < 30, "JPEG of noise loses much, but not the picture"


def test_keep_alive_changes_nothing(url: str, picture: bytes, speech: Array, expected: Array) -> None:
    def chunks(session: AvatarSession) -> Iterator[Array]:
        for start in range(0, speech.size, BLOCK_SAMPLES):
            yield speech[start : start + BLOCK_SAMPLES]
            session.keep_alive()

    with AvatarSession(url, image=picture, prompt="hello", seed=3) as session:
        assert np.array_equal(frames_of(list(session.stream(chunks(session)))), expected)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"lookahead_ms": 200}, marks=pytest.mark.slow),
        pytest.param({"sink_update_block": 2}, marks=pytest.mark.slow),
        pytest.param({"sink_update_block": None}, marks=pytest.mark.slow),
    ],
)
def test_other_streams_of_the_same_graphs(
    artifacts: Artifacts, tmp_path: Path, picture: bytes, speech: Array, expected: Array, changes: dict[str, int | None]
) -> None:
    """Look-ahead and the block of the sink's update are no part of the graphs; the server follows the manifest."""
    folder = tmp_path / "tiny"
    shutil.copytree(artifacts.folder, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["preset"]["stream"] |= changes
    (folder / "manifest.json").write_text(json.dumps(manifest))
    oracle = Generator(OnnxRuntime(load_artifacts(folder)))
    frames = generated(oracle, picture, "hello", 3, speech)
    assert frames.shape == expected.shape
    assert not np.array_equal(frames, expected)
    with serving(ServerOptions(folder).on_free_ports()) as server:
        assert np.array_equal(frames_of(received(server.options.url, picture, speech)), frames)
