"""The last stage: decodes clean latents into the frames that the client gets.

Sends the failures of earlier stages to the client.
"""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from live_avatar.arrays import Array
from live_avatar.pipeline.decoder import DecoderState, FrameDecoder
from live_avatar.runtime import Runtime
from live_avatar.serving import metrics
from live_avatar.serving.failures import PipeError
from live_avatar.serving.metrics import Meter
from live_avatar.serving.options import OptionsReader, SessionOptions
from live_avatar.serving.resources import KnownAvatars, SessionRoom
from live_avatar.serving.sessions import SessionLimits, SessionTable
from live_avatar.serving.stage import PipeStage, StageRequest, StageResponse, expect_block
from live_avatar.serving.tensors import AVATAR_KEY, LATENT, NO_BLOCK, RECEIVED_NS, SINK_MOTION
from live_avatar_client import protocol
from live_avatar_client.protocol import FrameFormat

FRAMES, JPEG_FRAMES, JPEG_SIZES = protocol.FRAMES.name, protocol.JPEG_FRAMES.name, protocol.JPEG_SIZES.name
FORWARDED = (protocol.FIRST_FRAME.name, protocol.PROVENANCE.name)
"""Outputs of conditioning for the client. They pass through here, because Triton would skip the stages for a client
that asks for these outputs alone."""


@dataclass
class _Session:
    options: SessionOptions
    decoder: DecoderState
    blocks: int = 0


class VAEDecoderStage(PipeStage[_Session]):
    """Streaming decoders of all live sessions: clean LATENT -> FRAMES or JPEG_FRAMES, the other with zero rows."""

    def __init__(
        self,
        runtime: Runtime,
        meter: Meter,
        room: SessionRoom,
        limits: SessionLimits,
        label_font: Path | None = None,
    ) -> None:
        super().__init__("vae_decoder", meter, SessionTable(limits.idle_s))
        self._stream = runtime.preset.stream
        self._decoder = FrameDecoder(runtime)
        self._room = room
        self._avatars: KnownAvatars[dict[str, Array]] = KnownAvatars(limits.known_avatars, meter)
        self._options = OptionsReader(self._stream.height, self._stream.width, label_font)
        self._no_frames = np.zeros((0, self._stream.height, self._stream.width, 3), dtype=np.uint8)
        meter.declare(metrics.FRAMES)
        meter.declare(metrics.LATENCY)
        meter.declare(metrics.FIRST_BLOCK)

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
        return StageResponse(outputs, block)

    def forward_failure(self, request: StageRequest, failure: PipeError) -> StageResponse:
        """Sends the failure to the client, because there is no next stage."""
        raise failure

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
