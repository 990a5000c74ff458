"""One denoising step as a served stage: it owns the caches of every session at its noise level."""

from __future__ import annotations

from contextlib import suppress

import numpy as np

from live_avatar.arrays import Array
from live_avatar.denoiser import DenoisingStep, StepState
from live_avatar.errors import SessionError
from live_avatar.runtime import Runtime
from live_avatar.serving.metrics import Meter
from live_avatar.serving.resources import KnownAvatars, SessionRoom
from live_avatar.serving.rolling_sink import SinkClient
from live_avatar.serving.stage import (
    NO_BLOCK,
    PipeError,
    PipeStage,
    SessionTable,
    StageRequest,
    StageResponse,
    expect_block,
    failure_tensor,
)
from live_avatar.serving.tensors import (
    AUDIO_GLOBAL,
    AUDIO_LOCAL,
    AVATAR,
    FAILURE,
    LATENT,
    SINK_KEY,
    SINK_MOTION,
    SINK_REFERENCE,
    SINK_TEXT,
)
from live_avatar.sink import SinkSource, first_latent_frame, gives_sink


class DiTStepStage(PipeStage[StepState]):
    """Step `step` (from 1) of all live sessions: LATENT at its noise level -> LATENT at the next."""

    def __init__(
        self,
        runtime: Runtime,
        step: int,
        sinks: SinkClient,
        idle_limit_s: float,
        meter: Meter,
        room: SessionRoom,
        known_avatars: int,
    ) -> None:
        super().__init__(f"dit_step_{step}", meter, SessionTable(idle_limit_s))
        self._stream = runtime.preset.stream
        self._denoiser = DenoisingStep(runtime, step)
        self._sinks = sinks
        self._room = room
        self._avatars: KnownAvatars[dict[str, Array]] = KnownAvatars(known_avatars, meter)

    def work(self, request: StageRequest, block: int) -> StageResponse:
        latent = request.inputs[LATENT]
        state = self._state(request)
        if block == NO_BLOCK:
            return self._answer(latent)
        expect_block(request.session, block, state.blocks)
        audio = {"audio_local": request.inputs[AUDIO_LOCAL], "audio_global": request.inputs[AUDIO_GLOBAL]}
        latent = self._denoiser.run(state, latent, audio)
        if self._denoiser.step == self._stream.steps and gives_sink(block, self._stream):
            self._sinks.put(_sink_key(request), first_latent_frame(latent))
        return self._answer(latent, block)

    def passed(self, request: StageRequest, failure: PipeError) -> StageResponse:
        return self._answer(np.zeros((0, *self._stream.latent_shape), dtype=np.float32), failure=failure)

    def failed_here(self, request: StageRequest) -> None:
        with suppress(SessionError):  # the rolling sink is gone, and every session with it
            self._sinks.fail(_sink_key(request))  # so that conditioning does not wait for a sink that never comes

    def _answer(self, latent: Array, block: int = NO_BLOCK, failure: PipeError | None = None) -> StageResponse:
        return StageResponse({LATENT: latent, FAILURE: failure_tensor(failure)}, block)

    def _state(self, request: StageRequest) -> StepState:
        """The session's state: new at its start, with another sink when one comes along."""
        source = SinkSource(*(request.inputs[name] for name in (SINK_REFERENCE, SINK_MOTION, SINK_TEXT)))
        if request.start:
            self._room.require()
            sink = self._avatars.get(request.inputs[AVATAR].tobytes(), lambda: self._denoiser.prefill(source))
            return self.sessions.open(request.session, lambda: self._denoiser.open(sink))
        state = self.sessions.get(request.session)
        if len(source.reference):
            state.sink = self._denoiser.prefill(source)
        return state


def _sink_key(request: StageRequest) -> int:
    return int(request.inputs[SINK_KEY][0])
