"""The last stage: clean latents become the frames that the client gets."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from live_avatar.arrays import Array
from live_avatar.decoder import DecoderState, FrameDecoder
from live_avatar.runtime import Runtime
from live_avatar.serving.stage import NO_BLOCK, SessionTable, StageRequest, StageResponse, expect_block
from live_avatar.serving.tensors import BLOCK, LATENT, SINK_MOTION
from live_avatar_client import protocol
from live_avatar_client.protocol import FRAME_FORMAT_PARAMETER, FrameFormat

FRAMES, JPEG_FRAMES = protocol.FRAMES.name, protocol.JPEG_FRAMES.name
JPEG_QUALITY = 90


@dataclass
class _Session:
    frame_format: FrameFormat
    decoder: DecoderState
    blocks: int = 0


class VAEDecoderStage:
    """Streaming decoders of all live sessions."""

    def __init__(self, runtime: Runtime, idle_limit_s: float) -> None:
        stream = runtime.preset.stream
        self._decoder = FrameDecoder(runtime)
        self._no_frames = np.zeros((0, stream.height, stream.width, 3), dtype=np.uint8)
        self._sessions: SessionTable[_Session] = SessionTable(idle_limit_s)

    def handle(self, request: StageRequest) -> StageResponse:
        """LATENT of a block, clean -> FRAMES or JPEG_FRAMES, the other with zero rows."""
        block = int(request.inputs[BLOCK][0])
        try:
            return self._handle(request, block)
        except Exception as error:
            self._sessions.fail(request.session, f"decoding, block {block + 1}: {error}")
            raise
        finally:
            if request.end:
                self._sessions.close(request.session)

    def _handle(self, request: StageRequest, block: int) -> StageResponse:
        session = self._start(request) if request.start else self._sessions.get(request.session)
        if block == NO_BLOCK:
            return StageResponse(self._outputs(self._no_frames, FrameFormat.RAW))
        expect_block(request.session, block, session.blocks)
        frames = self._decoder.decode(session.decoder, request.inputs[LATENT])
        session.blocks += 1
        return StageResponse(self._outputs(frames, session.frame_format), block)

    def _start(self, request: StageRequest) -> _Session:
        chosen = FrameFormat(str(request.parameters.get(FRAME_FORMAT_PARAMETER, FrameFormat.RAW.value)))
        motion = request.inputs[SINK_MOTION]
        return self._sessions.open(request.session, lambda: _Session(chosen, self._decoder.open(motion)))

    def _outputs(self, frames: Array, frame_format: FrameFormat) -> dict[str, Array]:
        if frame_format is FrameFormat.RAW:
            return {FRAMES: frames, JPEG_FRAMES: np.zeros(0, dtype=np.object_)}
        return {
            FRAMES: self._no_frames,
            JPEG_FRAMES: np.array([_jpeg(frame) for frame in frames], dtype=np.object_),
        }


def _jpeg(frame: Array) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
