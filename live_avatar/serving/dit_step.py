"""One denoising step as a served stage: it owns the caches of every session at its noise level."""

from __future__ import annotations

from live_avatar.denoiser import DenoisingStep, StepState
from live_avatar.runtime import Runtime
from live_avatar.serving.rolling_sink import SinkClient
from live_avatar.serving.stage import NO_BLOCK, SessionTable, StageRequest, StageResponse, expect_block
from live_avatar.serving.tensors import (
    AUDIO_GLOBAL,
    AUDIO_LOCAL,
    BLOCK,
    LATENT,
    SINK_MOTION,
    SINK_REFERENCE,
    SINK_TEXT,
)
from live_avatar.sink import SinkSource, first_latent_frame, gives_sink


class DiTStepStage:
    """Step `step` (from 1) of all live sessions."""

    def __init__(self, runtime: Runtime, step: int, sinks: SinkClient, idle_limit_s: float) -> None:
        self._stream = runtime.preset.stream
        self._denoiser = DenoisingStep(runtime, step)
        self._sinks = sinks
        self._sessions: SessionTable[StepState] = SessionTable(idle_limit_s)

    def handle(self, request: StageRequest) -> StageResponse:
        """LATENT of a block at this step's noise level -> LATENT at the next."""
        block = int(request.inputs[BLOCK][0])
        try:
            return self._handle(request, block)
        except Exception as error:
            self._sessions.fail(request.session, f"step {self._denoiser.step}, block {block + 1}: {error}")
            self._sinks.fail(request.session)
            raise
        finally:
            if request.end:
                self._sessions.close(request.session)

    def _handle(self, request: StageRequest, block: int) -> StageResponse:
        latent = request.inputs[LATENT]
        state = self._state(request)
        if block == NO_BLOCK:
            return StageResponse({LATENT: latent})
        expect_block(request.session, block, state.blocks)
        audio = {"audio_local": request.inputs[AUDIO_LOCAL], "audio_global": request.inputs[AUDIO_GLOBAL]}
        latent = self._denoiser.run(state, latent, audio)
        if self._denoiser.step == self._stream.steps and gives_sink(block, self._stream):
            self._sinks.put(request.session, first_latent_frame(latent))
        return StageResponse({LATENT: latent}, block)

    def _state(self, request: StageRequest) -> StepState:
        """The session's state: new at its start, with another sink when one comes along."""
        source = SinkSource(*(request.inputs[name] for name in (SINK_REFERENCE, SINK_MOTION, SINK_TEXT)))
        if request.start:
            return self._sessions.open(request.session, lambda: self._denoiser.open(source))
        state = self._sessions.get(request.session)
        if len(source.reference):
            state.sink = self._denoiser.prefill(source)
        return state
