"""Stage 0: turns a request of the gateway into the input of the first denoising step.

Opens sessions, and sends a session's new sink down the pipe as soon as it is ready, at the latest with the block at
which it takes effect.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass

import numpy as np

from live_avatar.arrays import Array, Arrays
from live_avatar.errors import InputError
from live_avatar.inputs.speech import check_samples
from live_avatar.pipeline.conditioning import BlockInput, Conditioner, Conditioning
from live_avatar.pipeline.sink import SinkSource, takes_sink
from live_avatar.runtime import Runtime
from live_avatar.serving import metrics
from live_avatar.serving.failures import PipeError, failure_tensor
from live_avatar.serving.metrics import Meter
from live_avatar.serving.options import read_seed
from live_avatar.serving.rolling_sink import PendingSink, SinkReceiver
from live_avatar.serving.sessions import SessionLimits, SessionTable
from live_avatar.serving.stage import SessionStage, StageRequest, StageResponse
from live_avatar.serving.tensors import (
    AUDIO_GLOBAL,
    AUDIO_LOCAL,
    AUDIO_WEIGHT,
    AVATAR_KEY,
    BLOCK,
    FAILURE,
    LATENT,
    NO_BLOCK,
    PROVENANCE_IN,
    RECEIVED_NS,
    SINK_KEY,
    SINK_MOTION,
    SINK_REFERENCE,
    SINK_TEXT,
    SPEAKER_WEIGHTS,
)
from live_avatar_client import protocol

STAGE = "conditioning"
AUDIO, FIRST_FRAME, PROVENANCE = protocol.AUDIO.name, protocol.FIRST_FRAME.name, protocol.PROVENANCE.name
EMPTY = np.zeros(0, dtype=np.uint8)


@dataclass
class _Session:
    source: SinkSource
    conditioning: Conditioning
    new_sink: PendingSink

    def new_source(self) -> SinkSource | None:
        """What the new sink is made of: once, as soon as it is there."""
        if self.new_sink.latent is None or self.new_sink.was_sent:
            return None
        self.new_sink.was_sent = True
        return self.source.replaced(self.new_sink.latent)


class ConditioningStage(SessionStage[_Session]):
    """Conditioning of all live sessions."""

    def __init__(self, runtime: Runtime, meter: Meter, sinks: SinkReceiver, limits: SessionLimits) -> None:
        super().__init__(STAGE, meter, SessionTable(limits.idle_s))
        self._conditioner = Conditioner(runtime)
        self._stream = runtime.preset.stream
        self._dit = dit = runtime.preset.dit
        self._no_audio = {
            "audio_local": _zero_rows(1, 1, dit.dim),
            "audio_global": _zero_rows(1, dit.dim),
            "audio_weight": _zero_rows(1, 1),
        }
        self._sinks = sinks
        self.meter.declare(metrics.SINK_UPDATES)

    def handle(self, request: StageRequest) -> StageResponse:
        """AUDIO, and with START the avatar, the speakers' weights, provenance and seed -> the input of step 1 for one
        block.

        A request with invalid content changes nothing, and the session can go on. A failure that ends the session goes
        down the pipe, so that the session ends in every stage.
        """
        received_ns = time.monotonic_ns()
        try:
            return self._handle(request, received_ns)
        except Exception as error:
            live = self.sessions.peek(request.session)
            # The end of a failed session goes on: the later stages' batchers keep its sequence until they see END.
            if live is None and not (request.end and self.sessions.has_failed(request.session)):
                self.failed(error, NO_BLOCK)
                raise
            if isinstance(error, InputError) and not request.end:
                raise
            block = live.conditioning.blocks if live and request.inputs[AUDIO].size else NO_BLOCK
            failure = self.failed(error, block)
            self.sessions.fail(request.session, str(failure))
            return StageResponse(self._outputs(request, live, None, None, received_ns, failure))
        finally:
            if request.end:
                self.sessions.close(request.session)

    def _handle(self, request: StageRequest, received_ns: int) -> StageResponse:
        request.expect_caller()
        speech = self._speech(request.inputs)
        session = self._start(request) if request.start else self.sessions.get(request.session)
        self._fetch_sink(session)
        block = self._conditioner.block(session.conditioning, speech) if speech.size else None
        waited_s = 0.0
        if block is not None and takes_sink(block.index, self._stream):
            waited_s = self._sinks.wait(request.session, session.new_sink)
            self.meter.add(metrics.SINK_UPDATES)
        source = session.source if request.start else session.new_source()
        outputs = self._outputs(request, session, block, source, received_ns)
        return StageResponse(outputs, block.index if block else NO_BLOCK, waited_s)

    def _speech(self, inputs: Arrays) -> Array:
        """int16 [block_samples], [speakers, block_samples] of several speakers, or [0]."""
        speech, speakers = inputs[AUDIO], self._stream.speakers
        check_samples(speech.size, self._stream.block_samples, speakers)
        return speech if speakers == 1 or not speech.size else speech.reshape(speakers, -1)

    def _start(self, request: StageRequest) -> _Session:
        if request.session in self.sessions:
            raise InputError(
                f"session {request.session} is live already; start the new session under another sequence id."
            )
        for name in (AVATAR_KEY, SINK_MOTION, SINK_TEXT):
            if name not in request.inputs:
                raise InputError(f"the first request of a session has no {name}; send the avatar with it.")
        conditioning = self._conditioner.open(read_seed(request.parameters), request.inputs.get(SPEAKER_WEIGHTS))
        source = SinkSource.of(request.inputs[SINK_MOTION], request.inputs[SINK_TEXT]).copied()
        new_sink = self._sinks.pending(secrets.randbits(64))
        return self.sessions.open(request.session, lambda: _Session(source, conditioning, new_sink))

    def _fetch_sink(self, session: _Session) -> None:
        if 0 < session.conditioning.blocks <= (self._stream.sink_update_block or 0):
            self._sinks.fetch(session.new_sink)

    def _outputs(
        self,
        request: StageRequest,
        session: _Session | None,
        block: BlockInput | None,
        source: SinkSource | None,
        received_ns: int,
        failure: PipeError | None = None,
    ) -> dict[str, Array]:
        stream, dit = self._stream, self._dit
        if source is None:
            channels, _, height, width = stream.latent_shape
            empty = _zero_rows(channels, 1, height, width)
            source = SinkSource(empty, empty, _zero_rows(dit.text_dim))
        audio = block.audio if block else self._no_audio
        return {
            BLOCK: np.array([block.index if block else NO_BLOCK], dtype=np.int64),
            FIRST_FRAME: np.array([block.first_frame if block else 0], dtype=np.int64),
            LATENT: block.noise if block else _zero_rows(*stream.latent_shape),
            AUDIO_LOCAL: audio["audio_local"],
            AUDIO_GLOBAL: audio["audio_global"],
            AUDIO_WEIGHT: audio["audio_weight"],
            SINK_REFERENCE: source.reference,
            SINK_MOTION: source.motion,
            SINK_TEXT: source.text,
            AVATAR_KEY: request.inputs.get(AVATAR_KEY, EMPTY),
            SINK_KEY: np.array([session.new_sink.key if session else 0], dtype=np.uint64),
            RECEIVED_NS: np.array([received_ns], dtype=np.int64),
            FAILURE: failure_tensor(failure),
            PROVENANCE: request.inputs.get(PROVENANCE_IN, EMPTY),
        }


def _zero_rows(*shape: int) -> Array:
    """A tensor of zero rows of the given shape."""
    return np.zeros((0, *shape), dtype=np.float32)
