"""The end of a pipeline of Pipecat, without a network."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
from pipecat.frames.frames import OutputAudioRawFrame, OutputImageRawFrame, StartFrame
from pipecat.transports.base_output import BaseOutputTransport
from pipecat.transports.base_transport import TransportParams

from tests.integrations.players import Samples


class StubTransport(BaseOutputTransport):
    """Pipecat's output transport; what it would send is noted with the time at which a listener has it."""

    def __init__(self, params: TransportParams) -> None:
        super().__init__(params)
        self.pictures: list[tuple[float, np.ndarray[Any, Any]]] = []
        self.sounds: list[tuple[float, Samples]] = []
        self._due_s = 0.0

    async def start(self, frame: StartFrame) -> None:
        await super().start(frame)
        await self.set_transport_ready(frame)

    async def write_audio_frame(self, frame: OutputAudioRawFrame) -> bool:
        """Play it when what came before is played, as a track does; wait while more than a chunk is in the queue."""
        now_s = time.monotonic()
        self._due_s = max(self._due_s, now_s)
        sound = np.frombuffer(frame.audio, np.int16)
        self.sounds.append((self._due_s, sound))
        self._due_s += len(sound) / frame.sample_rate
        await asyncio.sleep(max(0.0, self._due_s - 0.04 - now_s))
        return True

    async def write_video_frame(self, frame: OutputImageRawFrame) -> bool:
        self.pictures.append((time.monotonic(), pixels_of(frame)))
        return True


def pixels_of(frame: OutputImageRawFrame) -> np.ndarray[Any, Any]:
    width, height = frame.size
    assert frame.format == "RGB"
    return np.frombuffer(frame.image, np.uint8).reshape(height, width, 3)
