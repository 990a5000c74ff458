"""A bot of Pipecat with a face.

    pip install 'live-avatar-client[pipecat]' 'pipecat-ai[webrtc,silero,runner]'
    export OPENAI_API_KEY=...
    export AVATAR_URL=localhost:8001 AVATAR_IMAGE=person.png
    python pipecat_bot.py

It listens, thinks and speaks with OpenAI's services; any others of Pipecat may take their place.
"""

import os
from typing import Any

from pipecat.frames.frames import LLMRunFrame
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair, LLMUserAggregatorParams
from pipecat.processors.frame_processor import FrameProcessor
from pipecat.services.openai.llm import OpenAILLMService
from pipecat.services.openai.stt import OpenAISTTService
from pipecat.services.openai.tts import OpenAITTSService
from pipecat.transports.base_transport import BaseTransport, TransportParams
from pipecat.workers.runner import WorkerRunner

from live_avatar_client.pipecat import VIDEO_OUT, LiveAvatarVideoService

WIDTH, HEIGHT = 720, 400
"""Of the video that the user sees; the transport scales the avatar's."""


def transport_params() -> TransportParams:
    """What every transport needs for the avatar."""
    return TransportParams(
        audio_in_enabled=True, audio_out_enabled=True, video_out_width=WIDTH, video_out_height=HEIGHT, **VIDEO_OUT
    )


def make_avatar() -> LiveAvatarVideoService:
    """The face; its place is between the TTS and the transport's output."""
    return LiveAvatarVideoService(
        os.environ.get("AVATAR_URL", "localhost:8001"),
        image=os.environ["AVATAR_IMAGE"],
        prompt="A person talks to the camera.",
        label="AI-generated",
        api_key=os.environ.get("AVATAR_API_KEY"),
    )


def make_worker(
    transport: BaseTransport,
    stt: FrameProcessor,
    llm: FrameProcessor,
    tts: FrameProcessor,
    vad: Any = None,
) -> PipelineWorker:
    """The whole bot."""
    context = LLMContext([{"role": "system", "content": "You are a friendly guide. Answer in one or two sentences."}])
    user, assistant = LLMContextAggregatorPair(context, user_params=LLMUserAggregatorParams(vad_analyzer=vad))
    pipeline = Pipeline([transport.input(), stt, user, llm, tts, make_avatar(), transport.output(), assistant])
    return PipelineWorker(pipeline, params=PipelineParams(enable_metrics=True))


async def bot(runner_args: Any) -> None:
    """Talk with one user; Pipecat's runner calls it for each."""
    from pipecat.audio.vad.silero import SileroVADAnalyzer
    from pipecat.runner.utils import create_transport

    key = os.environ["OPENAI_API_KEY"]
    transport = await create_transport(runner_args, {"webrtc": transport_params})
    worker = make_worker(
        transport,
        OpenAISTTService(api_key=key),
        OpenAILLMService(api_key=key),
        OpenAITTSService(api_key=key),
        SileroVADAnalyzer(),
    )

    async def greet(*_: object) -> None:
        await worker.queue_frame(LLMRunFrame())

    async def leave(*_: object) -> None:
        await worker.cancel()

    transport.add_event_handler("on_client_connected", greet)
    transport.add_event_handler("on_client_disconnected", leave)
    runner = WorkerRunner()
    await runner.add_workers(worker)
    await runner.run()


if __name__ == "__main__":
    from pipecat.runner.run import main

    main()
