"""The examples run as they are, on the real server; stubs stand only for the services behind a network."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncGenerator
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import pytest
from livekit import rtc
from livekit.agents import Agent, AgentSession, APIConnectOptions, tts
from pipecat.frames.frames import EndFrame, Frame, TTSAudioRawFrame, TTSSpeakFrame
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.services.settings import TTSSettings
from pipecat.services.tts_service import TTSService
from pipecat.transports.base_transport import BaseTransport
from pipecat.workers.runner import WorkerRunner

from tests.integrations.players import run, speech
from tests.integrations.rooms import StubRoom
from tests.integrations.transports import StubTransport

ROOT = Path(__file__).parents[2]
RATE_HZ = 24_000


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "client" / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _environment(triton: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVATAR_URL", triton)
    monkeypatch.setenv("AVATAR_IMAGE", str(ROOT / "live_avatar" / "assets" / "portrait.png"))


class LiveKitVoice(tts.TTS):
    """Says the demo's speech, whatever the text."""

    def __init__(self) -> None:
        super().__init__(capabilities=tts.TTSCapabilities(streaming=False), sample_rate=RATE_HZ, num_channels=1)

    def synthesize(self, text: str, *, conn_options: APIConnectOptions = APIConnectOptions()) -> tts.ChunkedStream:  # noqa: B008 - as in the base class
        return Said(tts=self, input_text=text, conn_options=conn_options)


class Said(tts.ChunkedStream):
    async def _run(self, output_emitter: tts.AudioEmitter) -> None:
        output_emitter.initialize(request_id="1", sample_rate=RATE_HZ, num_channels=1, mime_type="audio/pcm")
        output_emitter.push(speech(2.0, RATE_HZ).tobytes())
        output_emitter.flush()


def test_the_agent_of_livekit_has_a_face_and_can_be_interrupted():
    module = example("livekit_agent")

    async def conversation() -> tuple[StubRoom, Any, list[float]]:
        session: AgentSession[Any] = AgentSession(tts=LiveKitVoice())
        room = StubRoom()
        avatar = await module.give_face(session, cast(rtc.Room, room))
        positions: list[float] = []
        assert session.output.audio is not None
        session.output.audio.on("playback_finished", lambda event: positions.append(event.playback_position))
        started: list[object] = []
        session.output.audio.on("playback_started", started.append)
        await session.start(Agent(instructions="talk"))
        await session.say("Hello there.")
        said = session.say("And so on, and so on.")
        while len(started) < 2:
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
        await session.interrupt()
        await said
        await session.aclose()
        await avatar.aclose()
        return room, said, positions

    room, said, positions = run(conversation())
    assert len(room.tracks) == 2
    assert said.interrupted
    assert positions[0] == pytest.approx(2.0, abs=0.05)
    assert 0 < positions[1] < 2


class PipecatVoice(TTSService):
    """Says the demo's speech, whatever the text."""

    def __init__(self) -> None:
        settings = TTSSettings(model=None, voice=None, language=None)
        super().__init__(settings=settings, sample_rate=RATE_HZ, push_start_frame=True, push_stop_frames=True)

    async def run_tts(self, text: str, context_id: str) -> AsyncGenerator[Frame | None, None]:
        yield TTSAudioRawFrame(speech(2.0, RATE_HZ).tobytes(), RATE_HZ, 1, context_id=context_id)


class Silent(FrameProcessor):
    """Stands for a service that has nothing to do."""

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        await self.push_frame(frame, direction)


class StubLine(BaseTransport):
    """A transport whose input is silent."""

    def __init__(self, output: StubTransport) -> None:
        super().__init__()
        self._output_ = output

    def input(self) -> FrameProcessor:
        return Silent()

    def output(self) -> FrameProcessor:
        return self._output_


def test_the_bot_of_pipecat_has_a_face():
    module = example("pipecat_bot")
    params = module.transport_params()
    output = StubTransport(params)

    async def conversation() -> None:
        worker = module.make_worker(StubLine(output), Silent(), Silent(), PipecatVoice())
        started = asyncio.Event()

        @worker.event_handler("on_pipeline_started")
        async def _started(*_: object) -> None:
            started.set()

        async def talk() -> None:
            await started.wait()
            await worker.queue_frame(TTSSpeakFrame("Hello there."))
            await asyncio.sleep(1.0)
            await worker.queue_frame(EndFrame())

        runner = WorkerRunner()
        await runner.add_workers(worker)
        await asyncio.gather(runner.run(), talk())

    run(conversation())
    pictures = [pixels for _, pixels in output.pictures]
    assert {picture.shape for picture in pictures} == {(module.HEIGHT, module.WIDTH, 3)}
    assert len(pictures) >= 45
    said = np.concatenate([sound for _, sound in output.sounds])
    assert np.count_nonzero(said) == pytest.approx(np.count_nonzero(speech(2.0, RATE_HZ)), rel=0.02)
