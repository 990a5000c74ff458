"""What a caller's message may hold: everything of the contract passes, and nothing else does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from live_avatar.errors import InputError
from live_avatar.gateway.requests import (
    CallerRequest,
    check_size,
    error_response,
    inputs_of,
    read_request,
    response_error,
    triton_request,
)
from live_avatar_client.messages import Opening, Request
from live_avatar_client.protocol import BLOCK_SAMPLES, EndReason, FrameFormat
from live_avatar_client.wire import encode_request

PICTURE = b"\x89PNG\r\n\x1a\n and more"


def message(**parameters: Any) -> Any:
    """A good request of a session that is live, with more parameters."""
    made = service_pb2.ModelInferRequest(model_name="live_avatar", id="17")
    for name, value in {"sequence_id": 5, **parameters}.items():
        kind = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
        setattr(made.parameters[name], kind, value)
    made.inputs.add(name="AUDIO", datatype="INT16", shape=[BLOCK_SAMPLES])
    made.raw_input_contents.append(bytes(2 * BLOCK_SAMPLES))
    return made


def test_what_the_client_sends_is_read():
    opening = Opening(PICTURE, "a prompt", 7, FrameFormat.JPEG, 80, "AI")
    speech = np.arange(BLOCK_SAMPLES, dtype=np.int16)
    read = read_request(encode_request(Request(9, "token", speech, opening, EndReason.COMPLETED)))
    assert (read.session, read.start, read.end) == (9, True, True)
    assert np.array_equal(np.frombuffer(read.audio, np.int16), speech)
    assert (read.picture, read.prompt) == (PICTURE, "a prompt")
    chosen = {"seed": 7, "frame_format": "jpeg", "jpeg_quality": 80, "label": "AI", "end_reason": "completed"}
    assert {name: read.parameters[name] for name in chosen} == chosen


def test_values_may_be_typed_instead_of_raw():
    made = message()
    del made.raw_input_contents[:]
    made.inputs[0].contents.int_contents.extend(range(BLOCK_SAMPLES))
    assert read_request(made).audio == np.arange(BLOCK_SAMPLES, dtype="<i2").tobytes()
    made.inputs[0].contents.int_contents[3] = 70_000
    with pytest.raises(InputError, match="AUDIO has values outside INT16; send values inside it"):
        read_request(made)


def test_triton_gets_a_new_message_with_the_gateways_own_sequence():
    made = message(token="secret", seed=3, label="AI")
    made.outputs.add(name="FRAMES")
    sent = triton_request(read_request(made), 2**40)
    assert sent.parameters["sequence_id"].int64_param == 2**40
    assert set(sent.parameters) == {"sequence_id", "sequence_start", "sequence_end"}
    assert (sent.id, [output.name for output in sent.outputs]) == ("17", ["FRAMES"])
    tensors = [("AVATAR", "UINT8", np.arange(32, dtype=np.uint8))]
    sent = triton_request(read_request(made), 2**40, tensors, with_options=True)
    assert (sent.parameters["seed"].int64_param, sent.parameters["label"].string_param) == (3, "AI")
    assert "token" not in sent.parameters
    assert [tensor.name for tensor in sent.inputs] == ["AUDIO", "AVATAR"]


def spoil(change: Any) -> Any:
    made = message()
    change(made)
    return made


def add_input(made: Any, name: str, datatype: str, shape: list[int], content: bytes) -> None:
    made.inputs.add(name=name, datatype=datatype, shape=shape)
    made.raw_input_contents.append(content)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: setattr(m, "model_name", "dit_step_1"), "there is no model 'dit_step_1'; send requests to"),
        (lambda m: setattr(m, "model_version", "2"), "version '2'"),
        (lambda m: setattr(m, "id", "x" * 257), "has 257 characters; at most 256"),
        (lambda m: m.parameters["sequence_id"].Clear(), "the sequence id is None; it must be an integer from 1"),
        (lambda m: setattr(m.parameters["sequence_id"], "string_param", "5"), "the sequence id is '5'"),
        (lambda m: setattr(m.parameters["sequence_id"], "int64_param", -1), "the sequence id is -1"),
        (lambda m: setattr(m.parameters["sequence_start"], "int64_param", 1), "sequence_start is 1; it must be true"),
        (lambda m: setattr(m.parameters["x"], "string_param", "a" * 1000), "there is no parameter 'x'; leave it out"),
        (lambda m: m.ClearField("inputs") or m.ClearField("raw_input_contents"), "the request has no AUDIO; send"),
        (lambda m: add_input(m, "LATENT", "FP32", [1], bytes(4)), "there is no input 'LATENT'; send AUDIO"),
        (lambda m: add_input(m, "AUDIO", "INT16", [0], b""), "AUDIO is there twice"),
        (lambda m: m.raw_input_contents.append(b""), "1 inputs and 2 raw contents"),
        (lambda m: setattr(m.inputs[0], "datatype", "FP32"), "AUDIO is 'FP32' .7680.; expected INT16 .-1."),
        (lambda m: m.inputs[0].shape.append(1), "AUDIO is 'INT16' .7680, 1."),
        (lambda m: m.raw_input_contents.__setitem__(0, bytes(15361)), "15361 bytes, which is no whole number"),
        (lambda m: m.raw_input_contents.__setitem__(0, bytes(15358)), "the shape .7680. and 7679 values"),
        (
            lambda m: setattr(m.inputs[0].parameters["shared_memory_region"], "string_param", "x"),
            "AUDIO has parameters",
        ),
        (lambda m: m.outputs.add(name="LATENT"), "there is no output 'LATENT'; ask for FRAMES"),
        (
            lambda m: setattr(m.outputs.add(name="FRAMES").parameters["classification"], "int64_param", 1),
            "output FRAMES has parameters",
        ),
        (lambda m: add_input(m, "PROMPT", "BYTES", [1], b"\x05\0\0\0abc"), "PROMPT ends within a string"),
        (lambda m: add_input(m, "PROMPT", "BYTES", [1], b"\x01\0\0\0\xff"), "PROMPT is not UTF-8"),
        (lambda m: add_input(m, "PROMPT", "BYTES", [2], b"\x01\0\0\0a" * 2), "PROMPT has 2 strings; send one"),
        (lambda m: add_input(m, "PROMPT", "BYTES", [17], bytes(4) * 17), "more than 16 strings; send fewer"),
        (
            lambda m: add_input(m, "PROMPT", "BYTES", [1], (3000).to_bytes(4, "little") + b"a" * 3000),
            "PROMPT has 3000 characters; at most 2000",
        ),
    ],
)
def test_anything_else_is_refused_in_a_sentence(change: Any, words: str):
    with pytest.raises(InputError, match=words) as refused:
        read_request(spoil(change))
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("samples", [1, BLOCK_SAMPLES - 1, BLOCK_SAMPLES + 1, 2 * BLOCK_SAMPLES])
def test_speech_is_a_block_or_nothing(samples: int):
    made = message()
    made.inputs[0].shape[0] = samples
    made.raw_input_contents[0] = bytes(2 * samples)
    with pytest.raises(InputError, match=f"AUDIO has {samples} samples; a block has {BLOCK_SAMPLES}"):
        read_request(made)


def test_an_error_is_told_from_frames_without_parsing_them():
    assert response_error(error_response("5", "[FAILED] words")) == "[FAILED] words"
    frames = service_pb2.ModelStreamInferResponse()
    frames.infer_response.id = "5"
    frames.infer_response.raw_output_contents.append(b"\x0a" * 100)
    assert response_error(frames.SerializeToString()) is None
    answer = service_pb2.ModelStreamInferResponse.FromString(error_response("5", "x"))
    assert answer.infer_response.id == "5"


def test_a_keep_alive_is_no_block():
    assert not CallerRequest("", 1, False, False, b"").is_block
    assert CallerRequest("", 1, False, False, b"ab").is_block


def many(field: bytes) -> bytes:
    return field * (2**20 // len(field))


@pytest.mark.parametrize(
    "content",
    [
        many(b"\x2a\x00"),  # empty inputs: each takes a hundred bytes when parsed
        many(b"\x32\x08\x0a\x06FRAMES"),
        many(b"\x3a\x00"),
        many(b"\x10\x01"),
        b"\x0b" + bytes(100) + b"\x0c",
        service_pb2.ModelInferRequest(id="x" * 2**20).SerializeToString(),
    ],
    ids=["inputs", "outputs", "raw contents", "numbers", "a group", "an id"],
)
def test_a_message_that_is_slow_to_parse_is_not_parsed(content: bytes):
    with pytest.raises(InputError, match=r"more than 262144 bytes or 128 fields.*send large inputs in raw_input_cont"):
        check_size(content)


def test_the_size_of_a_good_message_is_that_of_its_inputs():
    made = message(token="secret")
    add_input(made, "REFERENCE_IMAGE", "UINT8", [2**25], bytes(2**25))
    check_size(made.SerializeToString())
    typed = message()
    del typed.raw_input_contents[:]
    typed.inputs[0].contents.int_contents.extend([-(2**15)] * BLOCK_SAMPLES)
    check_size(typed.SerializeToString())
    for damaged in (b"\xff" * 20, b"\x2a\x80", made.SerializeToString()[:-1]):
        check_size(damaged)  # the parser tells


def test_several_speakers_send_masks_and_a_block_of_each():
    opening = Opening(PICTURE, "", 7, FrameFormat.RAW, masks=(b"\x89PNG", b"0,0,5,5"))
    speech = np.arange(2 * BLOCK_SAMPLES, dtype=np.int16).reshape(2, -1)
    read = read_request(encode_request(Request(9, "token", speech, opening, None)), speakers=2)
    assert read.masks == (b"\x89PNG", b"0,0,5,5")
    assert np.array_equal(np.frombuffer(read.audio, np.int16), speech.reshape(-1))
    assert [tensor.shape for tensor in triton_request(read, 5).inputs] == [[2 * BLOCK_SAMPLES]]


@pytest.mark.parametrize("samples", [BLOCK_SAMPLES, 2 * BLOCK_SAMPLES - 1, 3 * BLOCK_SAMPLES])
def test_the_speech_of_two_is_two_blocks_or_nothing(samples: int):
    made = message()
    made.inputs[0].shape[0] = samples
    made.raw_input_contents[0] = bytes(2 * samples)
    with pytest.raises(
        InputError, match=rf"AUDIO has {samples} samples; a block has 7680 of each of 2 speakers, one af"
    ):
        read_request(made, speakers=2)


def test_a_server_of_one_speaker_says_nothing_of_masks():
    assert [spec.name for spec in inputs_of(1)] == ["AUDIO", "REFERENCE_IMAGE", "PROMPT"]
    assert [spec.name for spec in inputs_of(2)] == ["AUDIO", "REFERENCE_IMAGE", "PROMPT", "SPEAKER_MASKS"]
