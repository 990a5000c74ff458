"""A range of denoising steps as a served stage, with the caches of every session at its noise levels.

A sink is prefilled after an answer: the first one after that to START, a new one after that to an earlier block, if
there is one. If every stage prefilled it with the block at which it takes effect, that block would be late.
`live_avatar.pipeline.sink` says at which block the sink changes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from weakref import WeakSet

import numpy as np

from live_avatar.arrays import Array
from live_avatar.errors import SessionError
from live_avatar.pipeline.denoiser import Denoiser, DenoiserState
from live_avatar.pipeline.sink import SinkSource, first_latent_frame, gives_sink, takes_sink
from live_avatar.runtime import Runtime
from live_avatar.serving.failures import PipeError, failure_tensor
from live_avatar.serving.metrics import SINKS_AHEAD, STEPS, Meter
from live_avatar.serving.resources import KnownAvatars, SessionRoom
from live_avatar.serving.rolling_sink import SinkClient
from live_avatar.serving.sessions import SessionLimits, SessionTable
from live_avatar.serving.stage import PipeStage, StageRequest, StageResponse, expect_block
from live_avatar.serving.steps import stage_name
from live_avatar.serving.tensors import (
    AUDIO_GLOBAL,
    AUDIO_LOCAL,
    AUDIO_WEIGHT,
    AVATAR_KEY,
    FAILURE,
    LATENT,
    NO_BLOCK,
    SINK_KEY,
    SINK_MOTION,
    SINK_REFERENCE,
    SINK_TEXT,
)

AUDIO_INPUTS = {"audio_local": AUDIO_LOCAL, "audio_global": AUDIO_GLOBAL, "audio_weight": AUDIO_WEIGHT}
"""Inputs of `dit`, and the tensors that bring them."""


@dataclass(eq=False)
class _Session:
    """One session's caches. avatar: key and source of its first sink, until that is prefilled. Until its next sink
    takes effect: what it is made of, and the sink once it is prefilled."""

    state: DenoiserState
    avatar: tuple[bytes, SinkSource] | None = None
    next_source: SinkSource | None = None
    next_sink: dict[str, Array] | None = None


class DenoiserStage(PipeStage[_Session]):
    """Contiguous steps (counted from 1) of all live sessions: LATENT at the first one's noise level -> LATENT at the
    level after the last one."""

    def __init__(
        self,
        runtime: Runtime,
        steps: range,
        sinks: SinkClient,
        meter: Meter,
        room: SessionRoom,
        limits: SessionLimits,
    ) -> None:
        super().__init__(stage_name(steps), meter, SessionTable(limits.idle_s))
        self._stream = runtime.preset.stream
        self._denoiser = Denoiser(runtime, steps)
        self._sinks = sinks
        self._room = room
        self._avatars: KnownAvatars[dict[str, Array]] = KnownAvatars(limits.known_avatars, meter)
        self._ahead: WeakSet[_Session] = WeakSet()  # weak: an ended session frees its sink
        meter.declare(SINKS_AHEAD)
        meter.set(STEPS, len(steps))

    def work(self, request: StageRequest, block: int) -> StageResponse:
        latent = request.inputs[LATENT]
        session = self._session(request)
        if block != NO_BLOCK:
            latent = self._denoise(request, session, latent, block)
        return self._answer(latent, block, after_response=None if request.end else self._work_ahead(session))

    def _work_ahead(self, session: _Session) -> Callable[[], None] | None:
        """The prefill that can be done after the answer. So all stages prefill the sink of a new session at the same
        time, while the decoder warms up."""
        if session.avatar is not None:
            return partial(self._take_first_sink, session)
        if session.next_source is not None and self._has_room_ahead(session):
            return partial(self._prefill_ahead, session)
        return None

    def _denoise(self, request: StageRequest, session: _Session, latent: Array, block: int) -> Array:
        expect_block(request.session, block, session.state.blocks)
        self._take_first_sink(session)
        if takes_sink(block, self._stream):
            self._replace_sink(session)
        audio = {name: request.inputs[tensor] for name, tensor in AUDIO_INPUTS.items()}
        latent = self._denoiser.run(session.state, latent, audio)
        if self._denoiser.steps[-1] == self._stream.steps and gives_sink(block, self._stream):
            self._sinks.put(_sink_key(request), first_latent_frame(latent))
        return latent

    def forward_failure(self, request: StageRequest, failure: PipeError) -> StageResponse:
        return self._answer(np.zeros((0, *self._stream.latent_shape), dtype=np.float32), failure=failure)

    def on_local_failure(self, request: StageRequest) -> None:
        with suppress(SessionError):  # the rolling sink has died, and with it every session
            self._sinks.fail(_sink_key(request))  # so that conditioning does not wait for a sink that never comes

    def _answer(
        self,
        latent: Array,
        block: int = NO_BLOCK,
        failure: PipeError | None = None,
        after_response: Callable[[], None] | None = None,
    ) -> StageResponse:
        return StageResponse({LATENT: latent, FAILURE: failure_tensor(failure)}, block, after_response=after_response)

    def _session(self, request: StageRequest) -> _Session:
        """The session of a request: opens it at START, and keeps the source of its next sink when that arrives."""
        source = SinkSource(*(request.inputs[name] for name in (SINK_REFERENCE, SINK_MOTION, SINK_TEXT)))
        if request.start:
            self._room.require()
            avatar = request.inputs[AVATAR_KEY].tobytes(), source.copied()
            return self.sessions.open(request.session, lambda: _Session(self._denoiser.open({}), avatar))
        session = self.sessions.get(request.session)
        if len(source.reference):
            session.next_source = source.copied()
        return session

    def _take_first_sink(self, session: _Session) -> None:
        """Gives the session the sink of its avatar, once. After an error the first block tries again, and the client
        gets the error then."""
        if session.avatar is not None:
            key, source = session.avatar
            session.state.sink = self._avatars.get(key, lambda: self._denoiser.prefill(source))
            session.avatar = None

    def _has_room_ahead(self, session: _Session) -> bool:
        """Whether to prefill a sink ahead. `graphs.memory` counts one; more must leave a new session room."""
        return session not in self._ahead and (not self._ahead or self._room.holds(2))

    def _prefill_ahead(self, session: _Session) -> None:
        """Prefills a sink. After an error the sink's own block tries again, and the client gets the error then."""
        session.next_sink = self._prefill(session)
        self._ahead.add(session)

    def _replace_sink(self, session: _Session) -> None:
        sink = session.next_sink
        if sink is not None:
            self.meter.add(SINKS_AHEAD)
        else:
            if self._ahead and not self._room.holds(1):
                self._drop_sinks_ahead()
            sink = self._prefill(session)
        session.state.sink, session.next_source, session.next_sink = sink, None, None
        self._ahead.discard(session)

    def _drop_sinks_ahead(self) -> None:
        for session in self._ahead:
            session.next_sink = None
        self._ahead.clear()

    def _prefill(self, session: _Session) -> dict[str, Array]:
        assert session.next_source is not None, "conditioning sends the source no later than the block of the sink"
        return self._denoiser.prefill(session.next_source)


def _sink_key(request: StageRequest) -> int:
    return int(request.inputs[SINK_KEY][0])
