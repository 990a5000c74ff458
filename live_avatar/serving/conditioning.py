"""Stage 0: a client's request becomes the first input of the pipe.

Validates everything a client sends, admits sessions and counts how they end, and sends the replaced sink down the pipe
as soon as it is there, at the latest with the block at which it takes effect. Knows no Triton API: the rolling sink is
reached through a `SinkClient`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from live_avatar.arrays import Array, Arrays
from live_avatar.errors import CapacityError, InputError, SessionError, ShutdownError
from live_avatar.pipeline.conditioning import BlockInput, Conditioner, Conditioning, avatar_key
from live_avatar.pipeline.sink import SinkSource, takes_sink
from live_avatar.runtime import Runtime
from live_avatar.serving import metrics, options
from live_avatar.serving.control import Control, Phase
from live_avatar.serving.label import Label
from live_avatar.serving.metrics import EndCause, Meter, RefusalReason
from live_avatar.serving.options import SessionOptions
from live_avatar.serving.resources import KnownAvatars
from live_avatar.serving.rolling_sink import FAILED, READY, SinkClient
from live_avatar.serving.stage import (
    NO_BLOCK,
    PipeError,
    SessionStage,
    SessionTable,
    StageRequest,
    StageResponse,
    end_cause,
    failure_tensor,
)
from live_avatar.serving.status import Served
from live_avatar.serving.tensors import (
    AUDIO_GLOBAL,
    AUDIO_LOCAL,
    AVATAR_KEY,
    BLOCK,
    FAILURE,
    LATENT,
    RECEIVED_NS,
    SINK_KEY,
    SINK_MOTION,
    SINK_REFERENCE,
    SINK_TEXT,
    text_tensor,
)
from live_avatar_client import protocol
from live_avatar_client.protocol import ErrorCode

log = logging.getLogger(__name__)

AUDIO, PROMPT, REFERENCE_IMAGE = protocol.AUDIO.name, protocol.PROMPT.name, protocol.REFERENCE_IMAGE.name
FIRST_FRAME, PROVENANCE = protocol.FIRST_FRAME.name, protocol.PROVENANCE.name

SINK_POLL_S = 0.002
SINK_WAIT_LIMIT_S = 10.0


@dataclass
class _Session:
    source: SinkSource
    conditioning: Conditioning
    token: str
    reload_epoch: int
    sink_key: int
    """By which the new sink comes back: an id may be used again while the sink of the session before it still waits."""
    first_clean: Array | None = None
    """The new sink, from when it was fetched."""
    has_sent_sink: bool = False
    has_failed: bool = False

    def new_source(self) -> SinkSource | None:
        """What the new sink is made of, once, as soon as it is there."""
        if self.first_clean is None or self.has_sent_sink:
            return None
        self.has_sent_sink = True
        return self.source.replaced(self.first_clean)


@dataclass(frozen=True)
class _Opening:
    """What the answer to START carries besides the sink."""

    avatar: bytes
    provenance: str


class ConditioningStage(SessionStage[_Session]):
    """Conditioning of all live sessions."""

    def __init__(
        self,
        runtime: Runtime,
        sinks: SinkClient,
        idle_limit_s: float,
        served: Served,
        meter: Meter,
        control: Control,
        known_avatars: int,
        label_font: Path | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__("conditioning", meter, SessionTable(idle_limit_s, served.max_sessions))
        self._conditioner = Conditioner(runtime)
        self._avatars: KnownAvatars[SinkSource] = KnownAvatars(known_avatars, meter)
        self._stream = runtime.preset.stream
        self._dit = runtime.preset.dit
        self._sinks = sinks
        self._served = served
        self._control = control
        self._label_font = label_font
        self._sleep = sleep
        self._declare_metrics()

    def handle(self, request: StageRequest) -> StageResponse:
        """AUDIO, and with START the picture, prompt and parameters -> one block's input for step 1.

        A request that is refused for its content changes nothing, and the session can go on; what ends a session goes
        down the pipe, so that it ends in every stage.
        """
        received_ns = time.monotonic_ns()
        cause = end_cause(request)
        try:
            return self._handle(request, received_ns)
        except Exception as error:
            live = self.sessions.peek(request.session)
            if live is None:
                if request.start:
                    self._refused(request.session, error)
                if not (request.end and self.sessions.has_failed(request.session)):
                    raise
                # The later stages have dropped it too, but their batchers hold its place until they see END.
            if isinstance(error, InputError) and not request.end:
                raise
            block = live.conditioning.blocks if live and request.inputs[AUDIO].size else NO_BLOCK
            failure = self.failed(error, block)
            cause = EndCause.SHUTDOWN if isinstance(error, ShutdownError) else EndCause.FAILED
            self._end(request.session, cause)
            self.sessions.fail(request.session, str(failure))
            return StageResponse(self._outputs(live, None, None, None, received_ns, failure))
        finally:
            if request.end:
                self._end(request.session, cause)
            self._report()

    def on_idle(self, session: int, state: _Session) -> None:
        self.meter.add(metrics.SESSIONS_ENDED, reason=EndCause.SILENT)

    def on_reset(self, session: int, state: _Session) -> None:
        self.meter.add(metrics.SESSIONS_ENDED, reason=EndCause.FAILED)

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
            waited_s = self._await_sink(request.session, session)
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
        # Before the phase is looked at, so that a drain waits for a session that is about to begin.
        self._control.set_live_sessions(self.name, len(self.sessions) + 1)
        if self._control.phase is not Phase.SERVING:
            raise ShutdownError(
                "this server is shutting down and takes no new sessions; connect again to reach another one."
            )
        if REFERENCE_IMAGE not in request.inputs:
            raise InputError("the first request of a session has no REFERENCE_IMAGE; send the picture with it.")
        chosen, token = SessionOptions.parse(request.parameters), options.token(request.parameters)
        if chosen.label:
            Label(chosen.label, self._stream.height, self._stream.width, self._label_font)
        image, prompt = request.inputs[REFERENCE_IMAGE].tobytes(), _read_prompt(request.inputs)
        key = avatar_key(image, prompt)
        known = key in self._avatars

        def make() -> _Session:
            source = self._avatars.get(key, lambda: self._conditioner.avatar(image, prompt))
            return _Session(
                source, self._conditioner.open(chosen.seed), token, self._control.reload_epoch, secrets.randbits(64)
            )

        session = self.sessions.open(request.session, make)
        self.meter.add(metrics.SESSIONS_ADMITTED)
        log.info(
            "session %d started: %s avatar, %s frames, %d of %d sessions",
            request.session,
            "known" if known else "new",
            chosen.frame_format,
            len(self.sessions),
            self._served.max_sessions,
        )
        return session, _Opening(key, self._provenance(image, prompt, chosen.seed))

    def _continue(self, request: StageRequest) -> _Session:
        owner = self.sessions.peek(request.session)
        if owner is not None and options.token(request.parameters) != owner.token:
            raise InputError(
                f"session {request.session} was opened with another {protocol.TOKEN_PARAMETER}, so it belongs to "
                "another client; start a session of your own under another sequence id."
            )
        session = self.sessions.get(request.session)  # a sign of life
        for name in (REFERENCE_IMAGE, PROMPT):
            if name in request.inputs:
                raise InputError(f"{name} came after the first request; start a new session to change it.")
        is_bare_end = request.end and request.inputs[AUDIO].size == 0
        if self._control.phase is Phase.CLOSING and not is_bare_end:
            raise ShutdownError("this server is shutting down; reconnect, and start a new session to go on.")
        return session

    def _provenance(self, image: bytes, prompt: str, seed: int) -> str:
        """Says what makes the video; of picture and prompt only hashes."""
        made = {
            "generator": "Live Avatar on Triton",
            "version": self._served.version,
            "preset": self._served.preset,
            "artifacts": self._served.artifacts,
            "seed": seed,
            "picture_sha256": hashlib.sha256(image).hexdigest(),
            "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        return json.dumps(made)

    # How sessions come and go, in numbers

    def _declare_metrics(self) -> None:
        """Puts every series in its place, so that it reads 0 before anything has happened."""
        info = asdict(self._served)
        self.meter.set(metrics.SESSIONS_LIMIT, info.pop("max_sessions"))
        self.meter.set(metrics.INFO, 1, **info)
        self.meter.declare(metrics.SESSIONS_ADMITTED)
        self.meter.declare(metrics.SINK_UPDATES)
        for refusal in RefusalReason:
            self.meter.declare(metrics.SESSIONS_REFUSED, reason=refusal)
        for cause in EndCause:
            self.meter.declare(metrics.SESSIONS_ENDED, reason=cause)
        lost = self._control.live_in(self.name)  # with the process before this one
        self.meter.add(metrics.SESSIONS_ENDED, lost, reason=EndCause.FAILED)
        self._report()

    def _report(self) -> None:
        live = len(self.sessions)
        free = self._served.max_sessions - live if self._control.phase is Phase.SERVING else 0
        self.meter.set(metrics.SESSIONS_LIVE, live)
        self.meter.set(metrics.SESSIONS_FREE, free)
        self._control.set_live_sessions(self.name, live)

    def _end(self, session: int, cause: EndCause) -> None:
        if self.sessions.close(session) is not None:
            self.meter.add(metrics.SESSIONS_ENDED, reason=cause)

    def _refused(self, session: int, error: Exception) -> None:
        match error:
            case ShutdownError():
                reason = RefusalReason.SHUTDOWN
            case CapacityError():
                reason = RefusalReason.FULL
            case InputError():
                reason = RefusalReason.INPUT
            case _:
                if self.failed(error, NO_BLOCK).code is not ErrorCode.UNAVAILABLE:
                    return
                reason = RefusalReason.MEMORY
        self.meter.add(metrics.SESSIONS_REFUSED, reason=reason)
        log.info("session %d refused: %s", session, reason)

    def _fetch_sink(self, session: _Session) -> None:
        """Takes the new sink as soon as it is there, long before its block perhaps: the rolling sink forgets, but a
        session may pause as long as it likes."""
        begun = 0 < session.conditioning.blocks <= (self._stream.sink_update_block or 0)
        if session.first_clean is None and begun:
            state, latent = self._sinks.take(session.sink_key)
            if state == READY:
                session.first_clean = latent
            elif state == FAILED:
                session.has_failed = True

    def _await_sink(self, number: int, session: _Session) -> float:
        """Waits for the session's own first latent frame, and says how long; it is on its way, since block 1 went ahead
        of this one."""
        begun_s = time.monotonic()
        deadline = begun_s + SINK_WAIT_LIMIT_S
        while session.first_clean is None:
            if session.has_failed:
                raise SessionError(f"session {number} has failed in a later stage; end it and start a new one.")
            if time.monotonic() >= deadline or self._control.reload_epoch != session.reload_epoch:
                raise SessionError(
                    f"session {number}: block 1 gave no new sink within {SINK_WAIT_LIMIT_S:g} s, or was lost with a "
                    "stage that had to be loaded again; end it and start a new one."
                )
            self._sleep(SINK_POLL_S)
            self._fetch_sink(session)
        return time.monotonic() - begun_s

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
            nothing = _zero_rows(channels, 1, height, width)
            source = SinkSource(nothing, nothing, _zero_rows(dit.text_dim))
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
            AVATAR_KEY: np.frombuffer(opening.avatar if opening else b"", dtype=np.uint8),
            SINK_KEY: np.array([session.sink_key if session else 0], dtype=np.uint64),
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
        raise InputError(f"PROMPT is not UTF-8 ({error}); encode it so.") from error
