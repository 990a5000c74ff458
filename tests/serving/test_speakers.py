"""Several speakers through Triton: the frames are those of the generator, and what does not fit is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import service_pb2_grpc

from live_avatar.arrays import Array
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.pipeline.generator import Generator
from live_avatar.runtime.onnx_runtime import OnnxRuntime
from live_avatar.serving.provenance import ContentHashes
from live_avatar.serving.server import serving
from live_avatar.serving.server_options import ServerOptions
from live_avatar_client import AvatarSession, SessionRefused, Speaker
from live_avatar_client.base import open_channel
from live_avatar_client.messages import Opening, Request
from live_avatar_client.protocol import BLOCK_SAMPLES, EndReason, FrameFormat
from live_avatar_client.wire import METADATA_REQUEST, encode_request
from tests.cli.support import assert_refused, invoke, write_audio
from tests.conftest import noise_speech
from tests.support.speakers import LEFT, RIGHT, box_text, drawn_mask, two_faces

pytestmark = pytest.mark.slow  # the export of another size takes a minute

SPEAKERS = [Speaker(mask=LEFT), Speaker(mask=drawn_mask(RIGHT))]
MASKS = (box_text(LEFT), drawn_mask(RIGHT))
SEED = 3


@pytest.fixture(scope="module")
def url_of_two(artifacts_of_two: Artifacts) -> Iterator[str]:
    options = ServerOptions(artifacts_of_two.folder, starts_per_minute=100_000).on_free_ports()
    with serving(options) as running:
        yield running.options.url


@pytest.fixture(scope="module")
def both() -> Array:
    """Speech of two, int16 [2, samples], in six blocks: the sink is replaced. The second one is silent at first."""
    speech = np.stack([noise_speech(2.5, seed=1), noise_speech(2.5, seed=2)])
    speech[1, : 2 * BLOCK_SAMPLES] = 0
    return speech


@pytest.fixture(scope="module")
def expected(artifacts_of_two: Artifacts, both: Array) -> Array:
    generator = Generator(OnnxRuntime(artifacts_of_two))
    blocks = generator.generate(two_faces(), "hello", SEED, both, MASKS)
    return np.concatenate([block.frames for block in blocks])


def session_of(url: str, **options: Any) -> AvatarSession:
    given: dict[str, Any] = {"image": two_faces(), "prompt": "hello", "seed": SEED, "speakers": SPEAKERS, **options}
    return AvatarSession(url, **given)


def test_frames_equal_the_generators(url_of_two: str, both: Array, expected: Array) -> None:
    alone = 2 * BLOCK_SAMPLES
    with session_of(url_of_two) as session:
        session.send(both[0, :alone], speaker=0)
        session.send({0: both[0, alone:], 1: both[1, alone:]})
        session.end()
        blocks = list(session)
        assert (session.provenance or {})["mask_sha256s"] == list(ContentHashes.of(b"", "", MASKS).masks)
    assert np.array_equal(np.concatenate([block.frames for block in blocks]), expected)
    assert np.array_equal(np.concatenate([block.audio for block in blocks], axis=1)[:, : both.shape[1]], both)


def test_masks_make_a_difference_and_are_remembered_apart(url_of_two: str, both: Array, expected: Array) -> None:
    """The same picture and prompt with other masks, over one connection after the other."""
    for speakers, is_same in ((SPEAKERS[::-1], False), (SPEAKERS, True)):
        with session_of(url_of_two, speakers=speakers) as session:
            (block,) = session.stream([dict(enumerate(both[:, :BLOCK_SAMPLES]))])
        assert np.array_equal(block.frames, expected[:12]) == is_same


@pytest.mark.parametrize(
    ("speakers", "words"),
    [
        ([], "0 masks came for artifacts of 2 speakers; give one for each speaker"),
        ([*SPEAKERS, SPEAKERS[0]], "3 masks came for artifacts of 2 speakers"),
        ([SPEAKERS[0], Speaker(mask=(0, 0, 193, 96))], "the mask of speaker 1 is the box 0,0,193,96, which leaves the"),
        ([SPEAKERS[0], Speaker(mask=drawn_mask((0, 0, 0, 0)))], "the mask of speaker 1 is empty in the part of the"),
        ([Speaker(mask=two_faces()[:300]), SPEAKERS[0]], r"the mask of speaker 0 \(300 bytes\) is damaged"),
    ],
    ids=["none", "three", "box outside", "empty", "damaged"],
)
def test_masks_that_do_not_fit_are_refused_with_a_sentence(
    url_of_two: str, speakers: list[Speaker], words: str
) -> None:
    with session_of(url_of_two, speakers=speakers) as session, pytest.raises(SessionRefused, match=words):
        list(session)


def answers_to(url: str, *requests: Request) -> list[str]:
    with open_channel(url) as channel:
        calls = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        answers = calls.ModelStreamInfer(iter([encode_request(request) for request in requests]), timeout=120)
        return [answer.error_message for answer in answers]


def test_requests_that_lack_a_speaker_change_nothing(url_of_two: str) -> None:
    opening = Opening(two_faces(), "", 0, FrameFormat.RAW, masks=MASKS)
    nothing, block = np.zeros(0, np.int16), np.zeros((2, BLOCK_SAMPLES), np.int16)
    start, _, again, last = answers_to(
        url_of_two,
        Request(7, "t", nothing, opening, None),
        Request(7, "t", block, None, None),
        Request(7, "t", block[0], None, None),
        Request(7, "t", block, None, EndReason.COMPLETED),
    )
    assert (start, last) == ("", "")
    assert "AUDIO has 7680 samples; a block has 7680 of each of 2 speakers, one after another" in again


def test_the_metadata_tell_of_masks(url_of_two: str) -> None:
    with open_channel(url_of_two) as channel:
        calls = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        inputs = [tensor.name for tensor in calls.ModelMetadata(METADATA_REQUEST, timeout=20).inputs]
    assert inputs == ["AUDIO", "REFERENCE_IMAGE", "PROMPT", "SPEAKER_MASKS"]


def test_the_command_line_makes_the_same_frames(
    url_of_two: str, artifacts_of_two: Artifacts, tmp_path: Path, both: Array
) -> None:
    for name, samples in zip(("a.wav", "b.wav"), both, strict=True):
        write_audio(tmp_path / name, samples[:9000] / 32768.0, "pcm_s16le")
    (tmp_path / "picture.png").write_bytes(two_faces())
    (tmp_path / "mask.png").write_bytes(drawn_mask(RIGHT))
    given = ("--audio", tmp_path / "a.wav", "--mask", "0,0,96,96", "--speech", tmp_path / "b.wav")
    given = (*given, "--image", tmp_path / "picture.png", "--seed", SEED)
    mask = ("--mask", tmp_path / "mask.png")
    for command, place in (("generate", ("--artifacts", artifacts_of_two.folder)), ("stream", ("--url", url_of_two))):
        files = ("--output", tmp_path / f"{command}.mp4", "--frames-output", tmp_path / f"{command}.npy")
        result = invoke(command, *given, *mask, *files, *place)
        assert result.exit_code == 0, result.stderr
    assert (tmp_path / "generate.npy").read_bytes() == (tmp_path / "stream.npy").read_bytes()
    result = invoke("generate", *given, "--output", tmp_path / "a.mp4", "--artifacts", artifacts_of_two.folder)
    assert_refused(result, "--audio is given 2 times and --mask once; give a --mask with each --audio")
