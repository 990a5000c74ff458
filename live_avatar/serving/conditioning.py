"""Stage 0: a client's request becomes the first input of the pipe.

Validates everything a client sends, admits sessions, and fetches the replaced sink for the block at which it
takes effect. Knows no Triton API: the rolling sink is reached through a callable.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from live_avatar.arrays import Array, Arrays
from live_avatar.conditioning import BlockInput, Conditioner, Conditioning
from live_avatar.errors import InputError, SessionError
from live_avatar.runtime import Runtime
from live_avatar.serving.rolling_sink import ABSENT, FAILED, SinkClient
from live_avatar.serving.stage import NO_BLOCK, SessionTable, StageRequest, StageResponse
from live_avatar.serving.tensors import (
    AUDIO_GLOBAL,
    AUDIO_LOCAL,
    BLOCK,
    LATENT,
    SINK_MOTION,
    SINK_REFERENCE,
    SINK_TEXT,
)
from live_avatar.sink import SinkSource, takes_sink
from live_avatar_client import protocol
from live_avatar_client.protocol import FRAME_FORMAT_PARAMETER, SEED_PARAMETER, FrameFormat

AUDIO, PROMPT, REFERENCE_IMAGE = protocol.AUDIO.name, protocol.PROMPT.name, protocol.REFERENCE_IMAGE.name
FIRST_FRAME = protocol.FIRST_FRAME.name

SINK_POLL_S = 0.002
SINK_WAIT_LIMIT_S = 120.0


@dataclass
class _Session:
    source: SinkSource
    conditioning: Conditioning


class ConditioningStage:
    """Conditioning of all live sessions."""

    def __init__(
        self,
        runtime: Runtime,
        sinks: SinkClient,
        idle_limit_s: float,
        max_sessions: int,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._conditioner = Conditioner(runtime)
        self._stream = runtime.preset.stream
        self._dit = runtime.preset.dit
        self._sinks = sinks
        self._sleep = sleep
        self._sessions: SessionTable[_Session] = SessionTable(idle_limit_s, max_sessions)

    def handle(self, request: StageRequest) -> StageResponse:
        """AUDIO, and with START the picture, prompt and parameters -> one block's input for step 1."""
        try:
            return self._handle(request)
        except InputError:
            raise  # refused before anything changed: the session can go on
        except Exception as error:
            self._sessions.fail(request.session, str(error))
            raise
        finally:
            if request.end:
                self._sessions.close(request.session)

    def _handle(self, request: StageRequest) -> StageResponse:
        speech = self._speech(request.inputs)
        session = self._start(request) if request.start else self._continue(request)
        opening = session.source if request.start else None
        if speech.size == 0:
            return StageResponse(self._outputs(None, opening))
        block = self._conditioner.block(session.conditioning, speech)
        if not takes_sink(block.index, self._stream):
            return StageResponse(self._outputs(block, opening), block.index)
        waited_from = time.monotonic()
        replaced = session.source.replaced(self._await_sink(request.session))
        return StageResponse(self._outputs(block, replaced), block.index, time.monotonic() - waited_from)

    def _speech(self, inputs: Arrays) -> Array:
        speech = inputs[AUDIO]
        if speech.size not in (0, self._stream.block_samples):
            raise InputError(
                f"AUDIO has {speech.size} samples; a block has {self._stream.block_samples} (pad the last one with "
                "zeros), a keep-alive 0."
            )
        return speech

    def _start(self, request: StageRequest) -> _Session:
        if request.session in self._sessions:
            raise InputError(
                f"session {request.session} is live already; start the new session under another sequence id."
            )
        if REFERENCE_IMAGE not in request.inputs:
            raise InputError("the first request of a session has no REFERENCE_IMAGE; send the picture with it.")
        _frame_format(request.parameters)
        seed = _integer(request.parameters, SEED_PARAMETER, default=0)
        image = request.inputs[REFERENCE_IMAGE].tobytes()
        prompt = _prompt(request.inputs)

        def make() -> _Session:
            return _Session(self._conditioner.avatar(image, prompt), self._conditioner.open(seed))

        return self._sessions.open(request.session, make)

    def _continue(self, request: StageRequest) -> _Session:
        for name in (REFERENCE_IMAGE, PROMPT):
            if name in request.inputs:
                raise InputError(f"{name} came after the first request; start a new session to change it.")
        return self._sessions.get(request.session)

    def _await_sink(self, session: int) -> Array:
        """The session's own first latent frame; it is on its way, since block 1 went ahead of this one."""
        deadline = time.monotonic() + SINK_WAIT_LIMIT_S
        while time.monotonic() < deadline:
            state, latent = self._sinks.take(session)
            if state == FAILED:
                raise SessionError(f"session {session} has failed in a later stage; end it and start a new one.")
            if state != ABSENT:
                return latent
            self._sleep(SINK_POLL_S)
        raise SessionError(
            f"session {session}: block 1 gave no new sink within {SINK_WAIT_LIMIT_S:g} s; end it and start a new one."
        )

    def _outputs(self, block: BlockInput | None, source: SinkSource | None) -> dict[str, Array]:
        stream, dit = self._stream, self._dit
        if source is None:
            channels, _, height, width = stream.latent_shape
            nothing = _rows(channels, 1, height, width)
            source = SinkSource(nothing, nothing, _rows(dit.text_dim))
        audio = block.audio if block else {"audio_local": _rows(1, dit.dim), "audio_global": _rows(dit.dim)}
        return {
            BLOCK: np.array([block.index if block else NO_BLOCK], dtype=np.int64),
            FIRST_FRAME: np.array([block.first_frame if block else 0], dtype=np.int64),
            LATENT: block.noise if block else _rows(*stream.latent_shape),
            AUDIO_LOCAL: audio["audio_local"],
            AUDIO_GLOBAL: audio["audio_global"],
            SINK_REFERENCE: source.reference,
            SINK_MOTION: source.motion,
            SINK_TEXT: source.text,
        }


def _rows(*shape: int) -> Array:
    """A tensor of zero rows of the given shape."""
    return np.zeros((0, *shape), dtype=np.float32)


def _prompt(inputs: Arrays) -> str:
    if PROMPT not in inputs:
        return ""
    if inputs[PROMPT].size != 1:
        raise InputError(f"PROMPT has {inputs[PROMPT].size} strings; send one.")
    try:
        return bytes(inputs[PROMPT].reshape(-1)[0]).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"PROMPT is not UTF-8 ({error}); encode it so.") from error


def _integer(parameters: Mapping[str, object], name: str, default: int) -> int:
    value = parameters.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"parameter {name} is {value!r}; it must be an integer.")
    return value


def _frame_format(parameters: Mapping[str, object]) -> FrameFormat:
    value = parameters.get(FRAME_FORMAT_PARAMETER, FrameFormat.RAW.value)
    try:
        return FrameFormat(str(value))
    except ValueError:
        names = " or ".join(f.value for f in FrameFormat)
        raise InputError(f"parameter {FRAME_FORMAT_PARAMETER} is {value!r}; it must be {names}.") from None
