"""Stage 0: turns a client's request into the input of the first denoising step.

Validates requests, opens sessions, and sends a session's new sink down the pipe as soon as it is ready, at the latest
with the block at which it takes effect.
"""

from __future__ import annotations

import logging
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from live_avatar.arrays import Array, Arrays
from live_avatar.errors import InputError
from live_avatar.pipeline.conditioning import BlockInput, Conditioner, Conditioning, avatar_key
from live_avatar.pipeline.sink import SinkSource, takes_sink
from live_avatar.runtime import Runtime
from live_avatar.serving import metrics, options
from live_avatar.serving.admission import STAGE, AdmissionController
from live_avatar.serving.endings import failure_cause, requested_cause
from live_avatar.serving.failures import PipeError, failure_tensor
from live_avatar.serving.metrics import EndCause
from live_avatar.serving.options import OptionsReader
from live_avatar.serving.provenance import provenance
from live_avatar.serving.resources import KnownAvatars
from live_avatar.serving.rolling_sink import PendingSink, SinkReceiver
from live_avatar.serving.sessions import SessionLimits, SessionTable
from live_avatar.serving.stage import SessionStage, StageRequest, StageResponse
from live_avatar.serving.tensors import (
    AUDIO_GLOBAL,
    AUDIO_LOCAL,
    AVATAR_KEY,
    BLOCK,
    FAILURE,
    LATENT,
    NO_BLOCK,
    RECEIVED_NS,
    SINK_KEY,
    SINK_MOTION,
    SINK_REFERENCE,
    SINK_TEXT,
    text_tensor,
)
from live_avatar_client import protocol

log = logging.getLogger(__name__)

AUDIO, PROMPT, REFERENCE_IMAGE = protocol.AUDIO.name, protocol.PROMPT.name, protocol.REFERENCE_IMAGE.name
FIRST_FRAME, PROVENANCE = protocol.FIRST_FRAME.name, protocol.PROVENANCE.name


@dataclass
class _Session:
    source: SinkSource
    conditioning: Conditioning
    token: str
    new_sink: PendingSink

    def new_source(self) -> SinkSource | None:
        """What the new sink is made of: once, as soon as it is there."""
        if self.new_sink.latent is None or self.new_sink.was_sent:
            return None
        self.new_sink.was_sent = True
        return self.source.replaced(self.new_sink.latent)


@dataclass(frozen=True)
class _Opening:
    """What the answer to START carries in addition to the sink."""

    avatar_key: bytes
    provenance: str


class ConditioningStage(SessionStage[_Session]):
    """Conditioning of all live sessions."""

    def __init__(
        self,
        runtime: Runtime,
        admission: AdmissionController,
        sinks: SinkReceiver,
        limits: SessionLimits,
        label_font: Path | None = None,
    ) -> None:
        super().__init__(STAGE, admission.meter, SessionTable(limits.idle_s, admission.served.max_sessions))
        self._conditioner = Conditioner(runtime)
        self._avatars: KnownAvatars[SinkSource] = KnownAvatars(limits.known_avatars, admission.meter)
        self._stream = runtime.preset.stream
        self._dit = runtime.preset.dit
        self._sinks = sinks
        self._admission = admission
        self._options = OptionsReader(self._stream.height, self._stream.width, label_font)
        self.meter.declare(metrics.SINK_UPDATES)

    def handle(self, request: StageRequest) -> StageResponse:
        """AUDIO, and with START the picture, prompt and parameters -> the input of step 1 for one block.

        A request with invalid content changes nothing, and the session can go on. A failure that ends the session goes
        down the pipe, so that the session ends in every stage.
        """
        received_ns = time.monotonic_ns()
        try:
            return self._handle(request, received_ns)
        except Exception as error:
            live = self.sessions.peek(request.session)
            if live is None:
                if request.start:
                    self._admission.refuse(request.session, error, self.failed(error, NO_BLOCK))
                if not (request.end and self.sessions.has_failed(request.session)):
                    raise
                # The later stages have dropped it too, but their batchers keep its sequence until they see END.
            if isinstance(error, InputError) and not request.end:
                raise
            block = live.conditioning.blocks if live and request.inputs[AUDIO].size else NO_BLOCK
            failure = self.failed(error, block)
            self._close(request.session, failure_cause(failure, self._admission.phase))
            self.sessions.fail(request.session, str(failure))
            return StageResponse(self._outputs(live, None, None, None, received_ns, failure))
        finally:
            if request.end:
                self._close(request.session, requested_cause(request.parameters))
            self._report()

    def on_ended(self, session: int, state: _Session, cause: EndCause, detail: str = "") -> None:
        self._admission.end(cause)

    def sweep(self, keep: int | None = None) -> None:
        super().sweep(keep)
        self._report()

    def _handle(self, request: StageRequest, received_ns: int) -> StageResponse:
        speech = self._speech(request.inputs)
        if request.start:
            session, opening = self._start(request)
        else:
            session, opening = self._continue(request), None
        self._fetch_sink(session)
        block = self._conditioner.block(session.conditioning, speech) if speech.size else None
        waited_s = 0.0
        if block is not None and takes_sink(block.index, self._stream):
            waited_s = self._sinks.wait(request.session, session.new_sink)
            self.meter.add(metrics.SINK_UPDATES)
        source = session.source if request.start else session.new_source()
        outputs = self._outputs(session, block, source, opening, received_ns)
        return StageResponse(outputs, block.index if block else NO_BLOCK, waited_s)

    def _speech(self, inputs: Arrays) -> Array:
        speech = inputs[AUDIO]
        if speech.size not in (0, self._stream.block_samples):
            raise InputError(
                f"AUDIO has {speech.size} samples; a block has {self._stream.block_samples} (pad the last one with "
                "zeros), a keep-alive 0."
            )
        return speech

    def _start(self, request: StageRequest) -> tuple[_Session, _Opening]:
        if request.session in self.sessions:
            raise InputError(
                f"session {request.session} is live already; start the new session under another sequence id."
            )
        self._admission.check_start(len(self.sessions))
        if REFERENCE_IMAGE not in request.inputs:
            raise InputError("the first request of a session has no REFERENCE_IMAGE; send the picture with it.")
        chosen = self._options.read(request.parameters)
        image, prompt = request.inputs[REFERENCE_IMAGE].tobytes(), _read_prompt(request.inputs)
        key = avatar_key(image, prompt)
        known = key in self._avatars

        def make() -> _Session:
            source = self._avatars.get(key, lambda: self._conditioner.avatar(image, prompt))
            new_sink = self._sinks.pending(secrets.randbits(64))
            return _Session(source, self._conditioner.open(chosen.seed), chosen.token, new_sink)

        session = self.sessions.open(request.session, make)
        self._admission.admit()
        log.info(
            "session %d started: %s avatar, %s frames, %d of %d sessions",
            request.session,
            "known" if known else "new",
            chosen.frame_format,
            len(self.sessions),
            self._admission.served.max_sessions,
        )
        return session, _Opening(key, provenance(self._admission.served, image, prompt, chosen.seed))

    def _continue(self, request: StageRequest) -> _Session:
        owner = self.sessions.peek(request.session)
        if owner is not None and options.token(request.parameters) != owner.token:
            raise InputError(
                f"session {request.session} was opened with another {protocol.TOKEN_PARAMETER}, so it belongs to "
                "another client; start a session of your own under another sequence id."
            )
        session = self.sessions.get(request.session)  # resets its idle time
        for name in (REFERENCE_IMAGE, PROMPT):
            if name in request.inputs:
                raise InputError(f"{name} came after the first request; start a new session to change it.")
        self._admission.check_continue(is_bare_end=request.end and request.inputs[AUDIO].size == 0)
        return session

    def _report(self) -> None:
        self._admission.report(len(self.sessions))

    def _close(self, session: int, cause: EndCause) -> None:
        state = self.sessions.close(session)
        if state is not None:
            self.on_ended(session, state, cause)

    def _fetch_sink(self, session: _Session) -> None:
        if 0 < session.conditioning.blocks <= (self._stream.sink_update_block or 0):
            self._sinks.fetch(session.new_sink)

    def _outputs(
        self,
        session: _Session | None,
        block: BlockInput | None,
        source: SinkSource | None,
        opening: _Opening | None,
        received_ns: int,
        failure: PipeError | None = None,
    ) -> dict[str, Array]:
        stream, dit = self._stream, self._dit
        if source is None:
            channels, _, height, width = stream.latent_shape
            empty = _zero_rows(channels, 1, height, width)
            source = SinkSource(empty, empty, _zero_rows(dit.text_dim))
        audio = block.audio if block else {"audio_local": _zero_rows(1, dit.dim), "audio_global": _zero_rows(dit.dim)}
        return {
            BLOCK: np.array([block.index if block else NO_BLOCK], dtype=np.int64),
            FIRST_FRAME: np.array([block.first_frame if block else 0], dtype=np.int64),
            LATENT: block.noise if block else _zero_rows(*stream.latent_shape),
            AUDIO_LOCAL: audio["audio_local"],
            AUDIO_GLOBAL: audio["audio_global"],
            SINK_REFERENCE: source.reference,
            SINK_MOTION: source.motion,
            SINK_TEXT: source.text,
            AVATAR_KEY: np.frombuffer(opening.avatar_key if opening else b"", dtype=np.uint8),
            SINK_KEY: np.array([session.new_sink.key if session else 0], dtype=np.uint64),
            RECEIVED_NS: np.array([received_ns], dtype=np.int64),
            FAILURE: failure_tensor(failure),
            PROVENANCE: text_tensor(opening.provenance if opening else ""),
        }


def _zero_rows(*shape: int) -> Array:
    """A tensor of zero rows of the given shape."""
    return np.zeros((0, *shape), dtype=np.float32)


def _read_prompt(inputs: Arrays) -> str:
    if PROMPT not in inputs:
        return ""
    if inputs[PROMPT].size != 1:
        raise InputError(f"PROMPT has {inputs[PROMPT].size} strings; send one.")
    try:
        return bytes(inputs[PROMPT].reshape(-1)[0]).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"PROMPT is not UTF-8 ({error}); encode it as UTF-8.") from error
