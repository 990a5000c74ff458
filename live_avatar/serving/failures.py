"""Failures of a stage: the error code and sentence for the client, and the tensor that carries them down the pipe."""

from __future__ import annotations

from live_avatar.arrays import Array, Arrays
from live_avatar.errors import CapacityError, InputError, LiveAvatarError, SessionError
from live_avatar.serving.tensors import FAILURE, NO_BLOCK, read_text, text_tensor
from live_avatar_client.protocol import ErrorCode, format_error, parse_error


class PipeError(LiveAvatarError):
    """A failure of a stage: the error code and the sentence for the client."""

    def __init__(self, code: ErrorCode, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


def describe(error: Exception, stage: str, block: int) -> PipeError:
    """The failure that the client is told for an error in a stage."""
    where = f"stage {stage} at block {block + 1}" if block != NO_BLOCK else f"stage {stage}"
    match error:
        case PipeError():
            return error
        case InputError():
            return PipeError(ErrorCode.INVALID_ARGUMENT, str(error))
        case CapacityError():
            return PipeError(ErrorCode.UNAVAILABLE, str(error))
        case SessionError():
            return PipeError(ErrorCode.FAILED_PRECONDITION, str(error))
    if is_out_of_memory(error):
        return PipeError(
            ErrorCode.UNAVAILABLE,
            f"{where} has no memory left ({str(error)[:200]}); try again later or elsewhere.",
        )
    return PipeError(
        ErrorCode.FAILED, f"{where} failed ({type(error).__name__}: {error}); end the session and start a new one."
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether the host or a GPU ran out of memory; torch is not imported here, so its error is known by name."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def failure_tensor(failure: PipeError | None) -> Array:
    """The FAILURE tensor; empty if there is no failure."""
    return text_tensor("" if failure is None else format_error(failure.code, str(failure)))


def read_failure(inputs: Arrays) -> PipeError | None:
    """The failure in a request, if it has one."""
    if not len(inputs[FAILURE]):
        return None
    code, sentence = parse_error(read_text(inputs[FAILURE]))
    return PipeError(code or ErrorCode.FAILED, sentence)
