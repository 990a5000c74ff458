"""Error texts and messages as they go over the wire, and the fake server's refusals."""

from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from live_avatar_client import ServerIncompatible
from live_avatar_client.messages import Opening, Request
from live_avatar_client.protocol import (
    AUDIO,
    OUTPUTS,
    PROVENANCE,
    EndReason,
    ErrorCode,
    FrameFormat,
    format_error,
    parse_error,
)
from live_avatar_client.testing import SAMPLE_IMAGE, SAMPLE_PROVENANCE, FakeAvatarServer
from live_avatar_client.wire import check_metadata, decode_json, decode_response, encode_request, put_tensor


@pytest.mark.parametrize("code", ErrorCode)
@pytest.mark.parametrize("prefix", ["", "in ensemble 'live_avatar', ", "in ensemble 'a', [request id: 7] "])
def test_errors_round_trip(code: ErrorCode, prefix: str) -> None:
    assert parse_error(prefix + format_error(code, "AUDIO [5] is\nwrong")) == (code, "AUDIO [5] is\nwrong")


@pytest.mark.parametrize("text", ["sequence id 5 must begin", "[request id: 7] [1,2] is no shape"])
def test_errors_without_a_code(text: str) -> None:
    message = text.removeprefix("[request id: 7] ")
    assert parse_error(text) == (None, message)
    assert parse_error(f"in ensemble 'live_avatar', {text}") == (None, message)


def request(
    samples: int = 0, opening: Opening | None = None, end: EndReason | None = None, token: str = "secret"
) -> Any:
    return encode_request(Request(5, token, np.zeros(samples, np.int16), opening, end))


def answer_of(server: FakeAvatarServer, message: Any) -> Any:
    (answer,) = server.answers(message)
    return answer


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([request(7680)], (ErrorCode.FAILED_PRECONDITION, "sequence 5 had no START; send it")),
        ([request(7)], (ErrorCode.INVALID_ARGUMENT, "AUDIO is of 7 samples; send INT16 [7680] or [0]")),
        (
            [request(7680, Opening(b"", "", 0, FrameFormat.RAW))],
            (ErrorCode.INVALID_ARGUMENT, "REFERENCE_IMAGE has 0 bytes; send a PNG, JPEG or WebP file"),
        ),
        (
            [request(7680, Opening(SAMPLE_IMAGE, "", 0, FrameFormat.RAW, frames_per_response=5))],
            (ErrorCode.INVALID_ARGUMENT, "frames_per_response is 5; send 4 or 12"),
        ),
        (
            [request(7680, Opening(SAMPLE_IMAGE, "", 0, FrameFormat.RAW))] * 2,
            (ErrorCode.INVALID_ARGUMENT, "sequence 5 is live; send START once"),
        ),
    ],
)
def test_the_fake_server_checks_requests(messages: list[object], error: tuple[ErrorCode, str]) -> None:
    server = FakeAvatarServer()
    *_, last = (answer_of(server, message) for message in messages)
    assert last.error_message.startswith("in ensemble 'live_avatar', [request id: <id_unknown>] [")
    assert parse_error(last.error_message) == error


def test_the_fake_server_knows_a_session_by_its_token() -> None:
    server = FakeAvatarServer()
    answer_of(server, request(0, Opening(SAMPLE_IMAGE, "", 0, FrameFormat.RAW)))
    stolen = answer_of(server, request(7680, token="guessed", end=EndReason.ABANDONED))
    message = "the token is not that of sequence 5; send the one of its START"
    assert parse_error(stolen.error_message) == (ErrorCode.INVALID_ARGUMENT, message)
    assert not answer_of(server, request(7680)).error_message
    answer_of(server, request(0, end=EndReason.COMPLETED))
    (session,) = server.sessions
    assert (len(session.blocks), session.end_reason) == (1, "completed")


def test_the_fake_server_refuses_a_quality_beyond_the_range() -> None:
    answer = answer_of(FakeAvatarServer(), request(0, Opening(SAMPLE_IMAGE, "", 0, FrameFormat.JPEG, 96)))
    assert parse_error(answer.error_message) == (ErrorCode.INVALID_ARGUMENT, "jpeg_quality is 96; send 1 to 95")


def test_provenance_is_in_the_answer_to_the_start_alone() -> None:
    server = FakeAvatarServer()
    start = answer_of(server, request(0, Opening(SAMPLE_IMAGE, "", 7, FrameFormat.RAW)))
    assert decode_response(start.infer_response).provenance == {**SAMPLE_PROVENANCE, "seed": 7}
    assert decode_response(answer_of(server, request(7680)).infer_response).provenance is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"{", "the server's PROVENANCE is no JSON: .*; use a client and a server of the same version"),
        (b"\xff", "the server's PROVENANCE is no JSON"),
        (b"[1]", "the server's PROVENANCE is a JSON list, expected an object; use a client"),
    ],
)
def test_unreadable_provenance(row: bytes, message: str) -> None:
    with pytest.raises(ServerIncompatible, match=message):
        decode_json(PROVENANCE, np.frombuffer(row, np.uint8))


@pytest.mark.parametrize("content", [b"123", b"\xff\xff\xff\xff"])
def test_an_unreadable_answer(content: bytes) -> None:
    message = service_pb2.ModelInferResponse()
    for spec in OUTPUTS:
        message.outputs.add(name=spec.name, datatype=spec.datatype, shape=[1] * len(spec.dims))
        message.raw_output_contents.append(content)
    with pytest.raises(ServerIncompatible, match=r"no readable FRAMES, expected UINT8 \[-1, -1, -1, 3\]"):
        decode_response(message)
    message.outputs[0].shape[:] = [0, 1, 1, 3]
    message.raw_output_contents[0] = b""
    message.outputs[1].shape[:] = [2]
    with pytest.raises(ServerIncompatible, match=r"no readable JPEG_FRAMES, expected UINT8 \[-1\]"):
        decode_response(message)


@pytest.mark.parametrize("sizes", [[2], [1, 3], [5, -2]])
def test_jpegs_that_do_not_add_up(sizes: list[int]) -> None:
    message = answer_of(FakeAvatarServer(), request(0, Opening(SAMPLE_IMAGE, "", 0, FrameFormat.JPEG))).infer_response
    names = [tensor.name for tensor in message.outputs]
    for name, array in (("JPEG_FRAMES", np.zeros(3, np.uint8)), ("JPEG_SIZES", np.array(sizes, np.int64))):
        message.outputs[names.index(name)].shape[:] = array.shape
        message.raw_output_contents[names.index(name)] = array.tobytes()
    total = sum(sizes)
    with pytest.raises(ServerIncompatible, match=f"JPEG_SIZES add up to {total} of 3 bytes of JPEG_FRAMES; use a"):
        decode_response(message)


def test_a_model_with_other_tensors() -> None:
    message = service_pb2.ModelMetadataResponse()
    with pytest.raises(ServerIncompatible, match="has nothing as input AUDIO, expected INT16; use a client"):
        check_metadata("here:1", message)
    message.inputs.add(name=AUDIO.name, datatype="FP32")
    with pytest.raises(ServerIncompatible, match="at here:1 has FP32 as input AUDIO, expected INT16"):
        check_metadata("here:1", message)


def test_an_answer_with_other_tensors() -> None:
    message = service_pb2.ModelInferResponse()
    put_tensor(message.outputs, message.raw_output_contents, AUDIO, np.zeros(3, np.int16))
    with pytest.raises(ServerIncompatible, match="no readable FRAMES"):
        decode_response(message)


def test_older_servers_see_no_parameter_that_they_do_not_know() -> None:
    whole, by_four = (
        request(0, Opening(SAMPLE_IMAGE, "", 0, FrameFormat.RAW, frames_per_response=count)) for count in (12, 4)
    )
    assert "frames_per_response" not in whole.parameters
    assert by_four.parameters["frames_per_response"].int64_param == 4


def test_the_fake_server_answers_a_block_three_times() -> None:
    server = FakeAvatarServer(lookahead_frames=5)
    answer_of(server, request(0, Opening(SAMPLE_IMAGE, "", 7, FrameFormat.RAW, frames_per_response=4)))
    answers = [decode_response(answer.infer_response) for answer in server.answers(request(7680))]
    assert [(answer.first_frame, len(answer.frames)) for answer in answers] == [(-5, 4), (-1, 4), (3, 4)]
