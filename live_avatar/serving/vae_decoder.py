"""The last stage: decodes clean latents into the frames that the client gets.

Sends the failures of earlier stages to the client, and logs how each session ended.
"""

from __future__ import annotations

import io
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from live_avatar.arrays import Array
from live_avatar.pipeline.decoder import DecoderState, FrameDecoder
from live_avatar.runtime import Runtime
from live_avatar.serving import metrics
from live_avatar.serving.control import Control
from live_avatar.serving.endings import failure_cause, requested_cause
from live_avatar.serving.failures import PipeError
from live_avatar.serving.metrics import EndCause, Meter
from live_avatar.serving.options import OptionsReader, SessionOptions
from live_avatar.serving.resources import KnownAvatars, SessionRoom
from live_avatar.serving.sessions import SessionLimits, SessionTable
from live_avatar.serving.stage import PipeStage, StageRequest, StageResponse, expect_block
from live_avatar.serving.tensors import AVATAR_KEY, LATENT, NO_BLOCK, RECEIVED_NS, SINK_MOTION
from live_avatar_client import protocol
from live_avatar_client.protocol import FrameFormat

log = logging.getLogger(__name__)

FRAMES, JPEG_FRAMES, JPEG_SIZES = protocol.FRAMES.name, protocol.JPEG_FRAMES.name, protocol.JPEG_SIZES.name
FORWARDED = (protocol.FIRST_FRAME.name, protocol.PROVENANCE.name)
"""Outputs of conditioning for the client. They pass through here, because Triton would skip the stages for a client
that asks for these outputs alone."""


@dataclass
class _Session:
    options: SessionOptions
    decoder: DecoderState
    blocks: int = 0
    frames: int = 0
    latency_sum_s: float = 0.0

    def summary(self) -> str:
        mean = f"{self.latency_sum_s / self.blocks:.3f} s" if self.blocks else "none"
        return f"{self.frames} frames, mean latency {mean}"


class VAEDecoderStage(PipeStage[_Session]):
    """Streaming decoders of all live sessions: clean LATENT -> FRAMES or JPEG_FRAMES, the other with zero rows."""

    def __init__(
        self,
        runtime: Runtime,
        meter: Meter,
        room: SessionRoom,
        control: Control,
        limits: SessionLimits,
        label_font: Path | None = None,
    ) -> None:
        super().__init__("vae_decoder", meter, SessionTable(limits.idle_s))
        self._stream = runtime.preset.stream
        self._decoder = FrameDecoder(runtime)
        self._room = room
        self._control = control
        self._avatars: KnownAvatars[dict[str, Array]] = KnownAvatars(limits.known_avatars, meter)
        self._options = OptionsReader(self._stream.height, self._stream.width, label_font)
        self._no_frames = np.zeros((0, self._stream.height, self._stream.width, 3), dtype=np.uint8)
        meter.declare(metrics.FRAMES)
        meter.declare(metrics.LATENCY)
        meter.declare(metrics.FIRST_BLOCK)
        self._report()

    def handle(self, request: StageRequest) -> StageResponse:
        try:
            return super().handle(request)
        finally:
            self._report()

    def sweep(self, keep: int | None = None) -> None:
        super().sweep(keep)
        self._report()

    def work(self, request: StageRequest, block: int) -> StageResponse:
        session = self._start(request) if request.start else self.sessions.get(request.session)
        frames = self._no_frames
        if block != NO_BLOCK:
            expect_block(request.session, block, session.blocks)
            frames = self._decoder.decode(session.decoder, request.inputs[LATENT])
            if session.options.label is not None:
                frames = session.options.label.draw(frames)
        outputs = self._outputs(frames, session.options) | {name: request.inputs[name] for name in FORWARDED}
        self._count(session, frames, request)
        if request.end:
            self.on_ended(request.session, session, requested_cause(request.parameters))
        return StageResponse(outputs, block)

    def forward_failure(self, request: StageRequest, failure: PipeError) -> StageResponse:
        """Sends the failure to the client, because there is no next stage."""
        raise failure

    def on_failed(self, session: int, state: _Session, failure: PipeError) -> None:
        self.on_ended(session, state, failure_cause(failure, self._control.phase), str(failure))

    def on_ended(self, session: int, state: _Session, cause: EndCause, detail: str = "") -> None:
        log.info("session %d ended: %s, %s%s", session, cause, state.summary(), f" ({detail})" if detail else "")

    def _report(self) -> None:
        self._control.set_live_sessions(self.name, len(self.sessions))

    def _start(self, request: StageRequest) -> _Session:
        self._room.require()
        options = self._options.read(request.parameters)
        motion = request.inputs[SINK_MOTION]
        caches = self._avatars.get(request.inputs[AVATAR_KEY].tobytes(), lambda: self._decoder.warm_up(motion))
        return self.sessions.open(request.session, lambda: _Session(options, DecoderState(caches)))

    def _count(self, session: _Session, frames: Array, request: StageRequest) -> None:
        if not len(frames):
            return
        latency_s = (time.monotonic_ns() - int(request.inputs[RECEIVED_NS][0])) / 1e9
        if session.blocks == 0:
            self.meter.observe(metrics.FIRST_BLOCK, latency_s)
        session.blocks += 1
        session.frames += len(frames)
        session.latency_sum_s += latency_s
        self.meter.add(metrics.FRAMES, len(frames))
        self.meter.observe(metrics.LATENCY, latency_s)

    def _outputs(self, frames: Array, options: SessionOptions) -> dict[str, Array]:
        if options.frame_format is FrameFormat.RAW:
            jpegs: list[bytes] = []
        else:
            jpegs = [_jpeg(frame, options.jpeg_quality) for frame in frames]
            frames = self._no_frames
        sizes = np.array([len(jpeg) for jpeg in jpegs], dtype=np.int64)
        return {FRAMES: frames, JPEG_FRAMES: np.frombuffer(b"".join(jpegs), dtype=np.uint8), JPEG_SIZES: sizes}


def _jpeg(frame: Array, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
