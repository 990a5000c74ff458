"""Turns requests and responses into KServe v2 messages and back.

Knows the tensors' encoding, for both directions (`testing` is the other end). It knows no session: it
keeps no state, and opens no connection.
"""

import struct
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2
from tritonclient.utils import deserialize_bytes_tensor, triton_to_np_dtype

from .core import Request, Response
from .errors import ServerIncompatible
from .protocol import (
    AUDIO,
    FIRST_FRAME,
    FRAME_FORMAT_PARAMETER,
    FRAMES,
    INPUTS,
    JPEG_FRAMES,
    MODEL_NAME,
    OUTPUTS,
    PROMPT,
    REFERENCE_IMAGE,
    SEED_PARAMETER,
    TensorSpec,
)

Message: TypeAlias = Any
"""A protobuf message: `tritonclient` ships no types for them."""

READY_REQUEST: Final[Message] = service_pb2.ModelReadyRequest(name=MODEL_NAME)
METADATA_REQUEST: Final[Message] = service_pb2.ModelMetadataRequest(name=MODEL_NAME)


def encode_request(request: Request) -> Message:
    """Return the ModelInferRequest of a block of audio."""
    message = service_pb2.ModelInferRequest(model_name=MODEL_NAME)
    message.parameters["sequence_id"].int64_param = request.sequence_id
    message.parameters["sequence_start"].bool_param = request.opening is not None
    message.parameters["sequence_end"].bool_param = request.end
    put_tensor(message.inputs, message.raw_input_contents, AUDIO, request.audio)
    if opening := request.opening:
        image = np.frombuffer(opening.image, np.uint8)
        put_tensor(message.inputs, message.raw_input_contents, REFERENCE_IMAGE, image)
        message.parameters[SEED_PARAMETER].int64_param = opening.seed
        message.parameters[FRAME_FORMAT_PARAMETER].string_param = opening.frame_format.value
        if opening.prompt:
            prompt = np.array([opening.prompt.encode()], np.object_)
            put_tensor(message.inputs, message.raw_input_contents, PROMPT, prompt)
    return message


def decode_response(message: Message) -> Response:
    """Return the frames of a ModelInferResponse; raise ServerIncompatible when it is another model's."""
    frames, jpegs, first_frame = (_output(message, spec) for spec in (FRAMES, JPEG_FRAMES, FIRST_FRAME))
    return Response(frames, tuple(jpegs.tolist()), int(first_frame[0]))


def check_ready(url: str, message: Message) -> None:
    """Raise ServerIncompatible unless the ModelReadyResponse says that the ensemble is ready."""
    if not message.ready:
        raise ServerIncompatible(
            f"the server at {url} has no ready model {MODEL_NAME!r}; wait until it is loaded, or pass the "
            "address of a Live Avatar server"
        )


def check_metadata(url: str, message: Message) -> None:
    """Raise ServerIncompatible unless the ensemble takes and gives the protocol's tensors."""
    for kind, specs, tensors in (("input", INPUTS, message.inputs), ("output", OUTPUTS, message.outputs)):
        datatypes = {tensor.name: tensor.datatype for tensor in tensors}
        for spec in specs:
            if datatypes.get(spec.name) != spec.datatype:
                raise ServerIncompatible(
                    f"the model {MODEL_NAME!r} at {url} has {datatypes.get(spec.name, 'nothing')} as {kind} "
                    f"{spec.name}, expected {spec.datatype}; use a client and a server of the same version"
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
    fits = len(shape) == len(spec.dims) and all(want in (-1, size) for size, want in zip(shape, spec.dims, strict=True))
    if tensor.datatype != spec.datatype or not fits:
        return None
    flat: NDArray[Any]
    try:
        if spec.datatype == "BYTES":
            flat = deserialize_bytes_tensor(content)
        else:
            flat = np.frombuffer(content, triton_to_np_dtype(spec.datatype))
        return flat.reshape(shape)
    except (ValueError, struct.error):
        return None
