"""The last stage: decodes clean latents into the frames that the client gets.

Sends the failures of earlier stages to the client.
"""

from __future__ import annotations

import io
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from live_avatar.arrays import Array
from live_avatar.errors import InputError, SessionError
from live_avatar.pipeline.decoder import DecoderState, FrameDecoder
from live_avatar.runtime import Runtime
from live_avatar.serving import metrics
from live_avatar.serving.failures import PipeError
from live_avatar.serving.metrics import Meter
from live_avatar.serving.options import OptionsReader, SessionOptions
from live_avatar.serving.provenance import origin_of
from live_avatar.serving.resources import KnownAvatars, SessionRoom
from live_avatar.serving.sessions import SessionLimits, SessionTable
from live_avatar.serving.stage import PipeStage, StageRequest, StageResponse, expect_block
from live_avatar.serving.tensors import AVATAR_KEY, LATENT, NO_BLOCK, RECEIVED_NS, SINK_MOTION
from live_avatar.watermark.embed import Watermark
from live_avatar.watermark.key import WatermarkKey
from live_avatar_client import protocol
from live_avatar_client.protocol import FrameFormat

FRAMES, JPEG_FRAMES, JPEG_SIZES = protocol.FRAMES.name, protocol.JPEG_FRAMES.name, protocol.JPEG_SIZES.name
FIRST_FRAME, PROVENANCE = protocol.FIRST_FRAME.name, protocol.PROVENANCE.name
"""Outputs of conditioning for the client. They pass through here, because Triton would skip the stages for a client
that asks for these outputs alone."""


@dataclass(frozen=True)
class Marking:
    """What an operator puts on all frames. key: of the invisible mark. label: the visible one."""

    key: WatermarkKey | None = None
    label: str | None = None
    label_font: Path | None = None


UNMARKED: Final = Marking()
NO_LATENTS: Final = np.zeros((1, 0, 0, 0, 0), dtype=np.float32)


@dataclass
class _Session:
    """One session. latents [1, 16, n, h, w]: those of block `blocks` (from 1) that were not decoded yet. first_frame:
    of the next response, on the speech's clock. frames: how many were made."""

    options: SessionOptions
    decoder: DecoderState
    mark: Watermark | None
    latents: Array = field(default_factory=lambda: NO_LATENTS)
    blocks: int = 0
    first_frame: int = 0
    frames: int = 0

    @property
    def has_latents(self) -> bool:
        """Whether frames of the newest block are still to come."""
        return self.latents.shape[2] > 0

    def take(self, latents: Array, first_frame: int) -> None:
        """Keeps a block's latents, whose frames the next responses have."""
        self.latents, self.first_frame = latents, first_frame
        self.blocks += 1

    def next_latents(self) -> Array:
        """Those of one response; none are left after the block's last one."""
        count = self.options.frames_per_response // protocol.FRAMES_PER_LATENT
        taken, self.latents = self.latents[:, :, :count], self.latents[:, :, count:]
        return taken


class VAEDecoderStage(PipeStage[_Session]):
    """Streaming decoders of all live sessions: clean LATENT -> FRAMES or JPEG_FRAMES, the other with zero rows.

    A session may ask for fewer frames in a response than a block has. Then each further request without a block, which
    has passed all stages behind the block, gets the next frames of it.
    """

    def __init__(
        self,
        runtime: Runtime,
        meter: Meter,
        room: SessionRoom,
        limits: SessionLimits,
        marking: Marking = UNMARKED,
    ) -> None:
        super().__init__("vae_decoder", meter, SessionTable(limits.idle_s))
        self._stream = runtime.preset.stream
        self._decoder = FrameDecoder(runtime)
        self._room = room
        self._avatars: KnownAvatars[dict[str, Array]] = KnownAvatars(limits.known_avatars, meter)
        self._options = OptionsReader(self._stream.height, self._stream.width, marking.label_font, marking.label)
        self._key = marking.key
        self._no_frames = np.zeros((0, self._stream.height, self._stream.width, 3), dtype=np.uint8)
        meter.declare(metrics.FRAMES)
        meter.declare(metrics.LATENCY)
        meter.declare(metrics.FIRST_BLOCK)

    def work(self, request: StageRequest, block: int) -> StageResponse:
        session = self._start(request) if request.start else self.sessions.get(request.session)
        if block != NO_BLOCK:
            expect_block(request.session, block, session.blocks)
            self._expect_decoded(request.session, session)
            session.take(request.inputs[LATENT].copy(), int(request.inputs[FIRST_FRAME][0]))
        frames = self._next_frames(session)
        outputs = self._outputs(frames, session.options) | {
            FIRST_FRAME: np.array([session.first_frame if len(frames) else 0], dtype=np.int64),
            PROVENANCE: request.inputs[PROVENANCE],
        }
        if block != NO_BLOCK:
            self._observe_latency(session, request)
        self.meter.add(metrics.FRAMES, len(frames))
        session.first_frame += len(frames)
        return StageResponse(outputs, session.blocks - 1 if len(frames) else NO_BLOCK, is_last=not session.has_latents)

    def _expect_decoded(self, number: int, session: _Session) -> None:
        if session.has_latents:
            left = session.latents.shape[2] * protocol.FRAMES_PER_LATENT
            raise SessionError(
                f"session {number} brings block {session.blocks + 1} while {left} frames of the one before were not "
                "fetched; send a request without samples for each response before the next block, or start a new "
                f"session without the parameter {protocol.FRAMES_PER_RESPONSE_PARAMETER}."
            )

    def _next_frames(self, session: _Session) -> Array:
        """The frames of the next response; none if no latents wait."""
        if not session.has_latents:
            return self._no_frames
        frames = self._decoder.decode(session.decoder, session.next_latents())
        if session.options.label is not None:
            frames = session.options.label.draw(frames)
        if session.mark is not None:
            frames = session.mark.apply(frames, session.frames)
        session.frames += len(frames)
        return frames

    def forward_failure(self, request: StageRequest, failure: PipeError) -> StageResponse:
        """Sends the failure to the client, because there is no next stage."""
        raise failure

    def _start(self, request: StageRequest) -> _Session:
        self._room.require()
        options = self._options.read(request.parameters)
        motion = request.inputs[SINK_MOTION]
        caches = self._avatars.get(request.inputs[AVATAR_KEY].tobytes(), lambda: self._decoder.warm_up(motion))
        mark = self._mark(request.inputs[protocol.PROVENANCE.name].tobytes().decode())
        return self.sessions.open(request.session, lambda: _Session(options, DecoderState(caches), mark))

    def _mark(self, provenance: str) -> Watermark | None:
        """The invisible mark of a session, with the numbers of its provenance; None if the server has no key."""
        if self._key is None:
            return None
        origin = origin_of(provenance)
        if origin is None:
            raise InputError("PROVENANCE_IN has no operator, which the invisible mark needs; give --operator.")
        return Watermark(self._key, origin, self._stream.height, self._stream.width)

    def _observe_latency(self, session: _Session, request: StageRequest) -> None:
        latency_s = (time.monotonic_ns() - int(request.inputs[RECEIVED_NS][0])) / 1e9
        if session.blocks == 1:
            self.meter.observe(metrics.FIRST_BLOCK, latency_s)
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
