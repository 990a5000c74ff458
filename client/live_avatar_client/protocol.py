"""The contract between a client and the `live_avatar` ensemble: names, types, sizes and error codes.

The client, the server's models and the tests of the configurations import it. It uses only the standard
library and has no state.
"""

import re
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Final

MODEL_NAME: Final = "live_avatar"
STATUS_MODEL: Final = "status"

SAMPLE_RATE_HZ: Final = 16_000
FPS: Final = 25
FRAMES_PER_BLOCK: Final = 12
FRAMES_PER_LATENT: Final = 4
FRAMES_PER_RESPONSE: Final = (FRAMES_PER_LATENT, FRAMES_PER_BLOCK)
"""How many frames a response may have. With 4, the frames of each latent come as soon as they are decoded: a block is
answered with three responses, which have the id of its request, and FIRST_FRAME says which frames they hold."""
SAMPLES_PER_FRAME: Final = SAMPLE_RATE_HZ // FPS
BLOCK_SAMPLES: Final = FRAMES_PER_BLOCK * SAMPLES_PER_FRAME

MAX_PROMPT_CHARS: Final = 2_000
MAX_IMAGE_BYTES: Final = 32 * 1024 * 1024
MAX_MASK_BYTES: Final = 1024 * 1024
MAX_IMAGE_PIXELS: Final = 64_000_000
MAX_SEED: Final = 2**63 - 1
MAX_LOOKAHEAD_FRAMES: Final = 30 * FPS
MAX_FRAME_PIXELS: Final = 3_840 * 2_160
MAX_ANSWER_BYTES: Final = FRAMES_PER_BLOCK * 3 * MAX_FRAME_PIXELS + 2**20
"""A block of the largest frames, and what comes with it."""
MAX_JSON_BYTES: Final = 64 * 1024
"""What a server may say of a video (PROVENANCE) or of itself (STATUS)."""
MAX_SEQUENCE_ID: Final = 2**63 - 1

MAX_LABEL_CHARS: Final = 64
MIN_JPEG_QUALITY: Final = 1
MAX_JPEG_QUALITY: Final = 95
DEFAULT_JPEG_QUALITY: Final = 90

# Parameters of the request with START
SEED_PARAMETER: Final = "seed"
FRAME_FORMAT_PARAMETER: Final = "frame_format"
JPEG_QUALITY_PARAMETER: Final = "jpeg_quality"
LABEL_PARAMETER: Final = "label"
FRAMES_PER_RESPONSE_PARAMETER: Final = "frames_per_response"
# of every request: a secret that only the client that opened the session knows
TOKEN_PARAMETER: Final = "token"
# and of the request with END
END_REASON_PARAMETER: Final = "end_reason"

API_KEY_HEADER: Final = "triton-grpc-protocol-api-key"
"""The gRPC metadata that carries the API key: Triton's restricted-protocol feature, with the key `api-key`."""


class FrameFormat(StrEnum):
    """How the server sends frames: RGB pixels in FRAMES, or one JPEG file each in JPEG_FRAMES."""

    RAW = "raw"
    JPEG = "jpeg"


class EndReason(StrEnum):
    """Why a client ends its session."""

    COMPLETED = "completed"
    """Every frame of the speech was requested."""
    ABANDONED = "abandoned"
    """The application closed the session before the last frame."""
    FAILED = "failed"
    """The client has met an error."""


class SequenceFlag(IntEnum):
    """The bits of a Triton request's flags that open and end a sequence."""

    START = 1
    END = 2


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the ensemble; -1 in `dims` is any size, as in Triton's `config.pbtxt`."""

    name: str
    datatype: str
    dims: tuple[int, ...]
    optional: bool = False


AUDIO: Final = TensorSpec("AUDIO", "INT16", (-1,))
REFERENCE_IMAGE: Final = TensorSpec("REFERENCE_IMAGE", "UINT8", (-1,), optional=True)
PROMPT: Final = TensorSpec("PROMPT", "BYTES", (1,), optional=True)
SPEAKER_MASKS: Final = TensorSpec("SPEAKER_MASKS", "BYTES", (-1,), optional=True)
"""With START, if the server has several speakers: for each one a PNG of the picture's size, light where the speaker is,
or a box in the picture's pixels, `x,y,width,height`. AUDIO then has a block of each speaker, one after another."""
FRAMES: Final = TensorSpec("FRAMES", "UINT8", (-1, -1, -1, 3))
# No output is of type BYTES: the output parameter `classification` on one crashes Triton 2.51 with a division by zero.
JPEG_FRAMES: Final = TensorSpec("JPEG_FRAMES", "UINT8", (-1,))
"""JPEG files, one after another."""
JPEG_SIZES: Final = TensorSpec("JPEG_SIZES", "INT64", (-1,))
"""Size of each JPEG file in bytes."""
FIRST_FRAME: Final = TensorSpec("FIRST_FRAME", "INT64", (1,))
PROVENANCE: Final = TensorSpec("PROVENANCE", "UINT8", (-1,))
"""A JSON object in UTF-8 with the provenance of the video, in the answer to START; empty in other answers."""

INPUTS: Final = (AUDIO, REFERENCE_IMAGE, PROMPT)
"""Of a server of one speaker; one of several takes SPEAKER_MASKS as well."""
OUTPUTS: Final = (FRAMES, JPEG_FRAMES, FIRST_FRAME, PROVENANCE, JPEG_SIZES)

# The model STATUS_MODEL returns the server's status; its requests belong to no session.
STATUS_QUERY: Final = TensorSpec("QUERY", "BYTES", (1,))
"""Ignored; send b"status"."""
STATUS: Final = TensorSpec("STATUS", "UINT8", (-1,))
"""A JSON object in UTF-8."""


class ErrorCode(StrEnum):
    """The machine-readable start of a server's error message."""

    UNAVAILABLE = "UNAVAILABLE"
    """All sessions of the server are taken, or it is shutting down: try again later or elsewhere."""
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    """A tensor or parameter of the request is wrong: a retry does not help."""
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    """The request does not fit the session's state: it is unknown, has ended or has failed."""
    FAILED = "FAILED"
    """The server failed while it worked on the session."""


_CODED = re.compile(rf"\[({'|'.join(ErrorCode)})\]\s*(.*)", re.DOTALL)
# Triton names the process of an instance: model name, version or instance group, number.
_STOPPED_STAGE = re.compile(r"Stub process '(?P<stage>.+?)(?:_\d+_\d+)?' is not healthy")
_TRITON_PREFIX = re.compile(r"^(?:in ensemble '[^']*',\s*)?(?:\[request id: [^\]]*\]\s*)?")


def format_error(code: ErrorCode, message: str) -> str:
    """Return the text that a server sends: `[CODE] message`."""
    return f"[{code.value}] {message}"


def parse_error(text: str) -> tuple[ErrorCode | None, str]:
    """Return the code and the message of an error, without Triton's prefix.

    The code is None for a text without one, for example Triton's own.
    """
    if coded := _CODED.search(text):
        return ErrorCode(coded[1]), coded[2].strip()
    return None, _TRITON_PREFIX.sub("", text).strip()


def explain_error(message: str) -> str:
    """Return the meaning of an error that Triton itself raised; other messages are returned unchanged."""
    if "must specify the START flag" in message:
        return (
            "the server no longer knows this session (it was silent for longer than the server's idle limit, or "
            "the server has lost it); open a new session"
        )
    if stopped := _STOPPED_STAGE.search(message):
        return f"the process of its stage {stopped['stage']} has stopped; open a new session when the server is ready"
    if "has no available versions" in message:
        return "one of its stages is being started again; open a new session when the server is ready"
    return message
