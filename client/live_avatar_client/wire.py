"""Turns requests and responses into KServe v2 messages and back."""

import itertools
import json
import struct
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2
from tritonclient.utils import deserialize_bytes_tensor, triton_to_np_dtype

from .errors import ServerIncompatible
from .messages import Opening, Request, Response
from .protocol import (
    AUDIO,
    END_REASON_PARAMETER,
    FRAME_FORMAT_PARAMETER,
    FRAMES_PER_BLOCK,
    FRAMES_PER_RESPONSE_PARAMETER,
    INPUTS,
    JPEG_QUALITY_PARAMETER,
    LABEL_PARAMETER,
    MAX_JSON_BYTES,
    MODEL_NAME,
    OUTPUTS,
    PROMPT,
    PROVENANCE,
    REFERENCE_IMAGE,
    SEED_PARAMETER,
    SPEAKER_MASKS,
    STATUS_MODEL,
    TOKEN_PARAMETER,
    TensorSpec,
)
from .text import printable

Message: TypeAlias = Any
"""A protobuf message; `tritonclient` has no type annotations for them."""

_SAME_VERSION: Final = "use a client and a server of the same version"

READY_REQUEST: Final[Message] = service_pb2.ModelReadyRequest(name=MODEL_NAME)
METADATA_REQUEST: Final[Message] = service_pb2.ModelMetadataRequest(name=MODEL_NAME)
EMPTY_REQUEST: Final[Message] = service_pb2.ModelInferRequest(model_name=STATUS_MODEL)
"""Its answer is an error, which shows whether the server is there and accepts the API key."""


def encode_request(request: Request) -> Message:
    """Return the ModelInferRequest of a block of audio."""
    message = service_pb2.ModelInferRequest(model_name=MODEL_NAME)
    message.parameters["sequence_id"].int64_param = request.sequence_id
    message.parameters["sequence_start"].bool_param = request.opening is not None
    message.parameters["sequence_end"].bool_param = request.end is not None
    message.parameters[TOKEN_PARAMETER].string_param = request.token
    if request.end is not None:
        message.parameters[END_REASON_PARAMETER].string_param = request.end.value
    put_tensor(message.inputs, message.raw_input_contents, AUDIO, request.audio.reshape(-1))
    if request.opening is not None:
        _put_opening(message, request.opening)
    return message


def _put_opening(message: Message, opening: Opening) -> None:
    image = np.frombuffer(opening.image, np.uint8)
    put_tensor(message.inputs, message.raw_input_contents, REFERENCE_IMAGE, image)
    message.parameters[SEED_PARAMETER].int64_param = opening.seed
    message.parameters[FRAME_FORMAT_PARAMETER].string_param = opening.frame_format.value
    message.parameters[JPEG_QUALITY_PARAMETER].int64_param = opening.jpeg_quality
    if opening.label:
        message.parameters[LABEL_PARAMETER].string_param = opening.label
    if opening.frames_per_response != FRAMES_PER_BLOCK:  # an older server does not know the parameter
        message.parameters[FRAMES_PER_RESPONSE_PARAMETER].int64_param = opening.frames_per_response
    if opening.prompt:
        prompt = np.array([opening.prompt.encode()], np.object_)
        put_tensor(message.inputs, message.raw_input_contents, PROMPT, prompt)
    if opening.masks:
        put_tensor(message.inputs, message.raw_input_contents, SPEAKER_MASKS, np.array(opening.masks, np.object_))


def decode_response(message: Message) -> Response:
    """Return the frames of a ModelInferResponse; raise ServerIncompatible when it has other tensors."""
    frames, jpegs, first_frame, text, sizes = (_output(message, spec) for spec in OUTPUTS)
    provenance = decode_json(PROVENANCE, text) if len(text) else None
    return Response(frames, _cut(jpegs.tobytes(), sizes), int(first_frame[0]), provenance)


def _cut(files: bytes, sizes: NDArray[np.int64]) -> tuple[bytes, ...]:
    """Return the concatenated files one by one."""
    if len(sizes) > FRAMES_PER_BLOCK:
        raise ServerIncompatible(
            f"the server's JPEG_SIZES has {len(sizes)} sizes, expected at most {FRAMES_PER_BLOCK}; {_SAME_VERSION}"
        )
    ends = list(itertools.accumulate(sizes.tolist(), initial=0))
    if ends[-1] != len(files) or sizes.min(initial=1) < 1:
        raise ServerIncompatible(
            f"the server's JPEG_SIZES add up to {ends[-1]} of {len(files)} bytes of JPEG_FRAMES; {_SAME_VERSION}"
        )
    return tuple(files[start:end] for start, end in itertools.pairwise(ends))


def decode_json(spec: TensorSpec, text: NDArray[np.uint8]) -> dict[str, Any]:
    """Return the JSON object in a tensor of `spec`; raise ServerIncompatible when it holds none."""
    if len(text) > MAX_JSON_BYTES:
        raise ServerIncompatible(
            f"the server's {spec.name} has {len(text)} bytes, expected at most {MAX_JSON_BYTES}; {_SAME_VERSION}"
        )
    try:
        value = json.loads(text.tobytes())
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # what was read can be written too
    except (ValueError, RecursionError) as error:
        reason = printable(str(error))
        raise ServerIncompatible(f"the server's {spec.name} is no JSON: {reason}; {_SAME_VERSION}") from error
    if not isinstance(value, dict):
        raise ServerIncompatible(
            f"the server's {spec.name} is a JSON {type(value).__name__}, expected an object; {_SAME_VERSION}"
        )
    return value


def check_ready(url: str, message: Message) -> None:
    """Raise ServerIncompatible unless the ModelReadyResponse says that the ensemble is ready."""
    if not message.ready:
        raise ServerIncompatible(
            f"the server at {url} has no ready model {MODEL_NAME!r}; wait until it is loaded, or pass the "
            "address of a Live Avatar server"
        )


def check_metadata(url: str, message: Message, *, speakers: int = 1) -> None:
    """Raise ServerIncompatible unless the ensemble has the protocol's inputs and outputs, masks for several speakers
    among them."""
    if speakers > 1 and SPEAKER_MASKS.name not in {tensor.name for tensor in message.inputs}:
        raise ServerIncompatible(
            f"the server at {url} serves pictures of one speaker, and the session has {speakers}; leave speakers out, "
            "or serve artifacts made with `live-avatar export --speakers`"
        )
    for kind, specs, tensors in (("input", INPUTS, message.inputs), ("output", OUTPUTS, message.outputs)):
        datatypes = {tensor.name: tensor.datatype for tensor in tensors}
        for spec in specs:
            if datatypes.get(spec.name) != spec.datatype:
                raise ServerIncompatible(
                    f"the model {MODEL_NAME!r} at {url} has {printable(datatypes.get(spec.name, 'nothing'))} as {kind} "
                    f"{spec.name}, expected {spec.datatype}; {_SAME_VERSION}"
                )


def put_tensor(tensors: Message, contents: Message, spec: TensorSpec, array: NDArray[Any]) -> None:
    """Append an array to a message's tensors and raw contents."""
    tensors.add(name=spec.name, datatype=spec.datatype, shape=array.shape)
    if spec.datatype == "BYTES":
        contents.append(b"".join(len(item).to_bytes(4, "little") + item for item in array.flat))
    else:
        contents.append(array.tobytes())


def get_tensor(tensors: Message, contents: Message, spec: TensorSpec) -> NDArray[Any] | None:
    """Return a message's tensor as a read-only array; None when it is missing or not as `spec` says."""
    for tensor, content in zip(tensors, contents, strict=False):
        if tensor.name == spec.name:
            return _decode_tensor(tensor, content, spec)
    return None


def _output(message: Message, spec: TensorSpec) -> NDArray[Any]:
    tensor = get_tensor(message.outputs, message.raw_output_contents, spec)
    if tensor is None:
        raise ServerIncompatible(
            f"the server's answer has no readable {spec.name}, expected {spec.datatype} {list(spec.dims)}"
        )
    return tensor


def _decode_tensor(tensor: Message, content: bytes, spec: TensorSpec) -> NDArray[Any] | None:
    shape = tuple(tensor.shape)
    fits = len(shape) == len(spec.dims) and all(
        size >= 0 and want in (-1, size) for size, want in zip(shape, spec.dims, strict=True)
    )
    if tensor.datatype != spec.datatype or not fits:
        return None
    flat: NDArray[Any]
    try:
        if spec.datatype == "BYTES":
            flat = deserialize_bytes_tensor(content)
        else:
            flat = np.frombuffer(content, triton_to_np_dtype(spec.datatype))
        return flat.reshape(shape)
    except (ValueError, OverflowError, struct.error):
        return None
