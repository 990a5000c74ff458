"""Checks a caller's request, and writes the request that goes to Triton: only what is named here passes.

A KServe v2 message may name shared memory, other models, priorities and outputs of any kind. The gateway reads the
fields of the contract (`live_avatar_client.protocol`) and makes a new message of them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np
from tritonclient.grpc import service_pb2

from live_avatar.arrays import Array
from live_avatar.errors import InputError
from live_avatar.inputs.speech import check_samples
from live_avatar_client import protocol

Message: TypeAlias = Any

MAX_REQUEST_ID_CHARS: Final = 256
MAX_FIELDS: Final = 128
MAX_BARE_BYTES: Final = 256 * 1024
"""Of a request without the raw contents of its inputs: a block of typed values takes up to 77 kB for each speaker."""
_RAW_CONTENTS: Final = 7  # field number of ModelInferRequest.raw_input_contents
_VARINT, _FIXED_64, _LENGTH, _FIXED_32 = 0, 1, 2, 5  # wire types
SEQUENCE_ID, SEQUENCE_START, SEQUENCE_END = "sequence_id", "sequence_start", "sequence_end"
OPENING_PARAMETERS: Final = (
    protocol.SEED_PARAMETER,
    protocol.FRAME_FORMAT_PARAMETER,
    protocol.JPEG_QUALITY_PARAMETER,
    protocol.LABEL_PARAMETER,
    protocol.FRAMES_PER_RESPONSE_PARAMETER,
)
IGNORED_PARAMETERS: Final = (protocol.TOKEN_PARAMETER, "priority", "timeout", "triton_enable_empty_final_response")
"""A session belongs to its stream, so the token of older clients is not needed; the others are tritonclient's own."""
KNOWN_PARAMETERS: Final = frozenset(
    {SEQUENCE_ID, SEQUENCE_START, SEQUENCE_END, protocol.END_REASON_PARAMETER, *OPENING_PARAMETERS, *IGNORED_PARAMETERS}
)
ALL_INPUTS: Final = (*protocol.INPUTS, protocol.SPEAKER_MASKS)
OUTPUT_NAMES: Final = tuple(spec.name for spec in protocol.OUTPUTS)


@dataclass(frozen=True)
class CallerRequest:
    """One request of one session, checked. audio: int16 PCM of one block, of every speaker one after another, or none.
    outputs: none asks for all."""

    request_id: str
    session: int
    start: bool
    end: bool
    audio: bytes
    picture: bytes | None = None
    prompt: str | None = None
    parameters: Mapping[str, object] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    masks: tuple[bytes, ...] | None = None

    @property
    def is_block(self) -> bool:
        return bool(self.audio)


def inputs_of(speakers: int) -> tuple[protocol.TensorSpec, ...]:
    """The inputs that a server of so many speakers says it has."""
    return protocol.INPUTS if speakers == 1 else ALL_INPUTS


def check_size(content: bytes) -> None:
    """Raises `InputError` for a serialized request that would be slow to parse or to read, or take much more memory
    than it has bytes: one with very many fields, or much that is not the raw content of an input."""
    try:
        size = _bare_bytes(content)
    except IndexError:
        return  # it ends within a field, which the parser tells
    if size > MAX_BARE_BYTES:
        raise InputError(
            f"the request has more than {MAX_BARE_BYTES} bytes or {MAX_FIELDS} fields beside the raw contents of its "
            "inputs; send large inputs in raw_input_contents."
        )


def _bare_bytes(content: bytes) -> int:
    """Bytes of a request without its raw contents; more than may be, if it has too many fields. Raises `IndexError` for
    one that ends too early."""
    place = raw = fields = 0
    while place < len(content):
        tag, place = _read_varint(content, place)
        fields += 1
        kind = tag & 7
        if kind == _LENGTH:
            size, place = _read_varint(content, place)
            place += size
            raw += size if tag >> 3 == _RAW_CONTENTS else 0
        elif kind == _VARINT:
            _, place = _read_varint(content, place)
        elif kind in (_FIXED_64, _FIXED_32):
            place += 8 if kind == _FIXED_64 else 4
        else:  # a group, which KServe v2 does not have
            return MAX_BARE_BYTES + 1
        if fields > MAX_FIELDS:
            return MAX_BARE_BYTES + 1
    return len(content) - raw


def _read_varint(content: bytes, place: int) -> tuple[int, int]:
    """The number, of at most 10 bytes, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = content[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise IndexError


def read_request(message: Message, speakers: int = 1) -> CallerRequest:
    """A `ModelInferRequest` as a `CallerRequest`. Raises `InputError` for anything outside the contract."""
    _expect_model(message)
    parameters = _parameters(message)
    session = parameters.pop(SEQUENCE_ID, 0)
    if isinstance(session, bool) or not isinstance(session, int) or not 0 < session <= protocol.MAX_SEQUENCE_ID:
        raise InputError(
            f"the sequence id is {_shown(session)}; it must be an integer from 1 to {protocol.MAX_SEQUENCE_ID}."
        )
    tensors = _tensors(message)
    start, end = _flag(parameters, SEQUENCE_START), _flag(parameters, SEQUENCE_END)
    audio = tensors.get(protocol.AUDIO.name)
    if audio is None:
        raise InputError("the request has no AUDIO; send a block of speech, or 0 samples as a keep-alive.")
    check_samples(audio.size, protocol.BLOCK_SAMPLES, speakers)
    masks = tensors.get(protocol.SPEAKER_MASKS.name)
    picture, prompt = tensors.get(protocol.REFERENCE_IMAGE.name), tensors.get(protocol.PROMPT.name)
    return CallerRequest(
        message.id,
        session,
        start,
        end,
        audio.tobytes(),
        None if picture is None else picture.tobytes(),
        None if prompt is None else _prompt(prompt),
        parameters,
        _outputs(message),
        None if masks is None else tuple(masks),
    )


def sequence_of(message: Message) -> int:
    """The sequence id of a request that need not be valid; 0 without one."""
    return int(message.parameters[SEQUENCE_ID].int64_param) if SEQUENCE_ID in message.parameters else 0


def triton_request(
    request: CallerRequest, sequence: int, tensors: Iterable[tuple[str, str, Array]] = (), with_options: bool = False
) -> Message:
    """The request for Triton. tensors: name, datatype and values that go with START."""
    message = service_pb2.ModelInferRequest(model_name=protocol.MODEL_NAME, id=request.request_id)
    message.parameters[SEQUENCE_ID].int64_param = sequence
    message.parameters[SEQUENCE_START].bool_param = request.start
    message.parameters[SEQUENCE_END].bool_param = request.end
    for name in OPENING_PARAMETERS if with_options else ():
        if name in request.parameters:
            _set_parameter(message, name, request.parameters[name])
    _add_tensor(message, protocol.AUDIO.name, "INT16", (len(request.audio) // 2,), request.audio)
    for name, datatype, values in tensors:
        _add_tensor(message, name, datatype, values.shape, values.tobytes())
    for name in request.outputs:
        message.outputs.add(name=name)
    return message


def end_request(sequence: int) -> Message:
    """A request that ends a sequence and asks for nothing."""
    return triton_request(CallerRequest("", 0, False, True, b""), sequence)


def error_response(request_id: str, text: str) -> bytes:
    """The `ModelStreamInferResponse` that says `text` to the request with that id, serialized."""
    message = service_pb2.ModelStreamInferResponse(error_message=text)
    message.infer_response.id = request_id
    return bytes(message.SerializeToString())


def response_error(response: bytes) -> str | None:
    """The error in a serialized `ModelStreamInferResponse`; None for frames, which are not parsed."""
    # Fields are written in the order of their numbers: an error is field 1 (tag 0x0a) and comes first.
    if not response.startswith(b"\x0a"):
        return None
    return str(service_pb2.ModelStreamInferResponse.FromString(response).error_message) or None


def _expect_model(message: Message) -> None:
    if message.model_name != protocol.MODEL_NAME or message.model_version not in ("", "1"):
        version = f" version {_shown(message.model_version)}" if message.model_version else ""
        raise InputError(
            f"there is no model {_shown(message.model_name)}{version}; send requests to {protocol.MODEL_NAME!r}."
        )
    if len(message.id) > MAX_REQUEST_ID_CHARS:
        raise InputError(f"the request id has {len(message.id)} characters; at most {MAX_REQUEST_ID_CHARS} are taken.")


def _parameters(message: Message) -> dict[str, Any]:
    unknown = sorted(set(message.parameters) - KNOWN_PARAMETERS)
    if unknown:
        known = ", ".join(sorted(KNOWN_PARAMETERS - set(IGNORED_PARAMETERS)))
        raise InputError(f"there is no parameter {_shown(unknown[0])}; leave it out, or use one of {known}.")
    values = {}
    for name, value in message.parameters.items():
        kind = value.WhichOneof("parameter_choice")
        values[name] = getattr(value, kind) if kind else None
    return values


def _flag(parameters: dict[str, Any], name: str) -> bool:
    value = parameters.pop(name, False)
    if not isinstance(value, bool):
        raise InputError(f"parameter {name} is {_shown(value)}; it must be true or false.")
    return value


def _tensors(message: Message) -> dict[str, Array]:
    specs = {spec.name: spec for spec in ALL_INPUTS}
    raw = list(message.raw_input_contents)
    if raw and len(raw) != len(message.inputs):
        raise InputError(
            f"the request has {len(message.inputs)} inputs and {len(raw)} raw contents; send one for each."
        )
    found: dict[str, Array] = {}
    for index, tensor in enumerate(message.inputs):
        spec = specs.get(tensor.name)
        if spec is None:
            raise InputError(f"there is no input {_shown(tensor.name)}; send {', '.join(specs)}.")
        if tensor.name in found:
            raise InputError(f"input {tensor.name} is there twice; send it once.")
        if tensor.parameters:
            raise InputError(f"input {tensor.name} has parameters; send its values in the request, without them.")
        found[tensor.name] = _values(spec, tensor, raw[index] if raw else None)
    return found


def _values(spec: protocol.TensorSpec, tensor: Message, raw: bytes | None) -> Array:
    shape = tuple(tensor.shape)
    if tensor.datatype != spec.datatype or len(shape) != len(spec.dims) or min(shape, default=0) < 0:
        raise InputError(
            f"input {spec.name} is {_shown(tensor.datatype)} {list(shape)[:8]}; expected {spec.datatype} "
            f"{list(spec.dims)}, where -1 is any size."
        )
    if spec.datatype == "BYTES":
        items = _strings(spec.name, raw) if raw is not None else list(tensor.contents.bytes_contents)
        values = np.array(items, dtype=np.object_)
    elif raw is not None:
        dtype = np.dtype({"INT16": "<i2", "UINT8": "u1"}[spec.datatype])
        if len(raw) % dtype.itemsize:
            raise InputError(f"input {spec.name} has {len(raw)} bytes, which is no whole number of values.")
        values = np.frombuffer(raw, dtype)
    else:
        values = _typed(spec, tensor)
    if values.shape != shape:
        raise InputError(f"input {spec.name} has the shape {list(shape)} and {values.size} values; make them agree.")
    return values


def _typed(spec: protocol.TensorSpec, tensor: Message) -> Array:
    numbers = tensor.contents.int_contents if spec.datatype == "INT16" else tensor.contents.uint_contents
    wide = np.array(numbers, dtype=np.int64)
    values: Array = wide.astype(np.int16 if spec.datatype == "INT16" else np.uint8)
    if not np.array_equal(values, wide):
        raise InputError(f"input {spec.name} has values outside {spec.datatype}; send values inside it.")
    return values


def _strings(name: str, raw: bytes) -> list[bytes]:
    items, place = [], 0
    while place < len(raw):
        if len(raw) - place < 4 or len(raw) - place - 4 < (size := struct.unpack_from("<I", raw, place)[0]):
            raise InputError(f"input {name} ends within a string; send each with its length before it.")
        items.append(raw[place + 4 : place + 4 + size])
        place += 4 + size
        if len(items) > 16:
            raise InputError(f"input {name} has more than 16 strings; send fewer.")
    return items


def _prompt(strings: Array) -> str:
    if strings.size != 1:
        raise InputError(f"PROMPT has {strings.size} strings; send one.")
    try:
        text = bytes(strings[0]).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"PROMPT is not UTF-8 ({error}); encode it as UTF-8.") from error
    if len(text) > protocol.MAX_PROMPT_CHARS:
        raise InputError(f"PROMPT has {len(text)} characters; at most {protocol.MAX_PROMPT_CHARS} are taken.")
    return text


def _outputs(message: Message) -> tuple[str, ...]:
    for output in message.outputs:
        if output.name not in OUTPUT_NAMES:
            raise InputError(f"there is no output {_shown(output.name)}; ask for {', '.join(OUTPUT_NAMES)}.")
        if output.parameters:
            raise InputError(f"output {output.name} has parameters; ask for it without them.")
    return tuple(dict.fromkeys(output.name for output in message.outputs))


def _set_parameter(message: Message, name: str, value: object) -> None:
    if isinstance(value, str):
        message.parameters[name].string_param = value
    else:
        message.parameters[name].int64_param = value


def _add_tensor(message: Message, name: str, datatype: str, shape: Iterable[int], content: bytes) -> None:
    message.inputs.add(name=name, datatype=datatype, shape=shape)
    message.raw_input_contents.append(content)


def _shown(value: object, most: int = 60) -> str:
    """A value for a message, shortened and without control characters."""
    shown = repr(value[: most + 1] if isinstance(value, str) else value)
    return shown if len(shown) <= most else f"{shown[:most]}..."
