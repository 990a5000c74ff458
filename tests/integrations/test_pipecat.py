"""A pipeline of Pipecat with the avatar, in its own test harness and with its own output transport."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from pipecat.frames.frames import (
    BotStartedSpeakingFrame,
    BotStoppedSpeakingFrame,
    EndFrame,
    ErrorFrame,
    Frame,
    FunctionCallResultFrame,
    InterruptionFrame,
    OutputAudioRawFrame,
    OutputImageRawFrame,
    OutputTransportReadyFrame,
    SpeechOutputAudioRawFrame,
    TTSAudioRawFrame,
    TTSStartedFrame,
    TTSStoppedFrame,
    TTSTextFrame,
)
from pipecat.observers.base_observer import BaseObserver, FramePushed
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.frame_processor import FrameDirection
from pipecat.tests.utils import SleepFrame, run_test
from pipecat.transports.base_transport import TransportParams
from pipecat.utils.errors import ErrorCategory
from pipecat.workers.runner import WorkerRunner

from live_avatar_client import ConnectFailed, InvalidInput, SessionFailed, SessionRefused
from live_avatar_client.pipecat import VIDEO_OUT, LiveAvatarVideoService
from live_avatar_client.testing import SAMPLE_IMAGE, FakeAvatarServer
from tests.integrations.conftest import LONGEST_SESSION_S
from tests.integrations.players import EARLY_S, LATE_S, Samples, chunks, direct_frames, loudness, run, speech, tone
from tests.integrations.transports import StubTransport, pixels_of

RATE_HZ = 16_000
ONE, TWO = 40, 80
"""Levels of tones: the first and the second speech."""
PARAMS = PipelineParams(audio_in_sample_rate=RATE_HZ, audio_out_sample_rate=RATE_HZ)
Feed = Callable[[PipelineWorker], Any]


class Witness(BaseObserver):
    """The frames that left a processor, in order, and the errors."""

    def __init__(self, source: object) -> None:
        super().__init__()
        self._source = source
        self.frames: list[Frame] = []
        self.errors: list[ErrorFrame] = []

    async def on_push_frame(self, data: FramePushed) -> None:
        if data.source is not self._source:
            return
        if isinstance(data.frame, ErrorFrame):
            self.errors.append(data.frame)
        elif data.direction is FrameDirection.DOWNSTREAM:
            self.frames.append(data.frame)


def spoken(samples: Samples, rate_hz: int = RATE_HZ) -> list[Frame]:
    """What a TTS pushes for a speech."""
    audio = [TTSAudioRawFrame(chunk.tobytes(), rate_hz, 1) for chunk in chunks(samples)]
    return [TTSStartedFrame(), *audio, TTSStoppedFrame()]


def media(frames: Sequence[Frame]) -> tuple[np.ndarray[Any, Any], list[Samples]]:
    """The pictures, uint8 [n, H, W, 3], and the sound that follows each; checks that they take turns."""
    played = [frame for frame in frames if isinstance(frame, (OutputImageRawFrame, SpeechOutputAudioRawFrame))]
    pictures, sounds = played[::2], played[1::2]
    assert all(isinstance(picture, OutputImageRawFrame) for picture in pictures)
    images = np.stack([pixels_of(picture) for picture in pictures if isinstance(picture, OutputImageRawFrame)])
    heard = []
    for sound in sounds:
        assert isinstance(sound, SpeechOutputAudioRawFrame)
        heard.append(np.frombuffer(sound.audio, np.int16))
    return images[: len(heard)], heard


def levels(frames: Sequence[Frame]) -> list[int]:
    """The loudness of each piece of sound that is not silence."""
    return [level for sound in media(frames)[1] if (level := loudness(sound))]


def through(service: LiveAvatarVideoService, frames: Sequence[Frame], **options: Any) -> list[Frame]:
    """What comes out of the service, in Pipecat's test harness, whose end stands for a transport that is ready."""

    async def whole() -> Sequence[Frame]:
        down, _ = await run_test(
            service,
            frames_to_send=[OutputTransportReadyFrame(), *frames],
            pipeline_params=PARAMS,
            start_timeout=30,
            **options,
        )
        return down

    return list(run(whole()))


async def play(service: LiveAvatarVideoService, transport: StubTransport, feed: Feed, witness: Witness) -> None:
    """Run a pipeline of both while `feed` queues frames; it ends with an EndFrame."""
    worker = PipelineWorker(
        Pipeline([service, transport]), cancel_on_idle_timeout=False, params=PARAMS, observers=[witness]
    )
    started = asyncio.Event()

    @worker.event_handler("on_pipeline_started")
    async def _started(*_: object) -> None:
        started.set()

    async def feeding() -> None:
        await started.wait()
        await feed(worker)
        await worker.queue_frame(EndFrame())

    runner = WorkerRunner()
    await runner.add_workers(worker)
    await asyncio.gather(runner.run(), feeding())


# On the real server


def test_every_frame_comes_in_order_with_its_sound(triton: str, portrait: bytes):
    """A plain session that is sent the same sound gives the same pixels: two segments, and idle frames around them."""
    first, second = speech(2.2), speech(3.2)[-20_000:]
    service = LiveAvatarVideoService(triton, image=portrait)
    frames = through(service, [*spoken(first), SleepFrame(3.5), *spoken(second)])
    pictures, sounds = media(frames)
    said = np.concatenate(sounds)
    end = 0
    for segment in (first, second):
        start = (end + int(np.flatnonzero(said[end:])[0])) // 640 * 640
        end = start + len(segment)
        np.testing.assert_array_equal(said[start:end], segment)
    assert not said[end:].any()
    np.testing.assert_array_equal(pictures, direct_frames(triton, portrait, sounds))
    stops = [index for index, frame in enumerate(frames) if isinstance(frame, TTSStoppedFrame)]
    assert len(stops) == 2
    last_sound = frames[stops[1] - 1]
    assert isinstance(last_sound, SpeechOutputAudioRawFrame)
    assert any(last_sound.audio)


def test_the_transport_shows_the_picture_with_its_sound(triton: str, portrait: bytes):
    """Through Pipecat's output transport with live video, for which `sync_with_audio` would lose every picture."""
    said = speech(2.5)
    service = LiveAvatarVideoService(triton, image=portrait)
    params = TransportParams(audio_out_enabled=True, video_out_width=96, video_out_height=96, **VIDEO_OUT)
    transport = StubTransport(params)

    async def feed(worker: PipelineWorker) -> None:
        await asyncio.sleep(1.0)
        for frame in spoken(said):
            await worker.queue_frame(frame)
        while not any(isinstance(frame, BotStoppedSpeakingFrame) for frame in witness.frames):
            await asyncio.sleep(0.1)

    witness = Witness(transport)
    run(play(service, transport, feed, witness))
    pairs = list(zip(transport.pictures, transport.sounds, strict=False))
    assert len(pairs) > 100
    speaking = [sound_s - shown_s for (shown_s, _), (sound_s, sound) in pairs if sound.any()]
    assert len(speaking) >= 60
    assert -EARLY_S < float(np.median(speaking)) < LATE_S, speaking
    pictures = np.stack([pixels for (_, pixels), _ in pairs])
    np.testing.assert_array_equal(pictures, direct_frames(triton, portrait, [sound for _, (_, sound) in pairs]))
    kinds = [type(frame) for frame in witness.frames if "Bot" in frame.name and "BotSpeaking" not in frame.name]
    assert kinds == [BotStartedSpeakingFrame, BotStoppedSpeakingFrame]


def test_an_error_of_the_real_server_in_mid_segment_reaches_the_pipeline(impatient_triton: str, portrait: bytes):
    said = np.tile(speech(6.0), 2)
    service = LiveAvatarVideoService(impatient_triton, image=portrait)
    witness = Witness(service)
    frames = through(service, spoken(said), observers=[witness])
    assert [type(error.exception) for error in witness.errors] == [SessionFailed]
    assert f"has lasted {LONGEST_SESSION_S} s, the longest that this server allows" in witness.errors[0].error
    audio = [frame.audio for frame in frames if isinstance(frame, OutputAudioRawFrame)]
    heard = np.frombuffer(b"".join(audio), np.int16)
    start = int(np.flatnonzero(heard)[0]) // 640 * 640
    np.testing.assert_array_equal(heard[start : start + len(said)], said)


def test_a_picture_that_the_server_refuses_is_an_error_of_the_pipeline(triton: str):
    service = LiveAvatarVideoService(triton, image=b"\x89PNG\r\n\x1a\n" + bytes(100))
    witness = Witness(service)
    frames = through(service, spoken(speech(0.5)), observers=[witness])
    assert len(witness.errors) == 1
    assert "the voice goes on without it: the server refused the session: " in witness.errors[0].error
    assert isinstance(witness.errors[0].exception, SessionRefused)
    assert witness.errors[0].category is ErrorCategory.INVALID_REQUEST
    assert sum(isinstance(frame, TTSAudioRawFrame) for frame in frames) == len(chunks(speech(0.5)))


# The contract, on a server whose frames say which speech they show


def test_the_end_and_the_words_of_a_speech_come_behind_their_sound():
    with FakeAvatarServer() as server:
        word = TTSTextFrame("word", "word")
        frames = through(
            LiveAvatarVideoService(server.url, image=SAMPLE_IMAGE),
            [
                TTSStartedFrame(),
                TTSAudioRawFrame(tone(ONE, 25).tobytes(), RATE_HZ, 1),
                word,
                TTSAudioRawFrame(tone(ONE, 5).tobytes(), RATE_HZ, 1),
                TTSStoppedFrame(),
            ],
        )
    assert levels(frames) == [ONE] * 30
    assert levels(frames[: frames.index(word)]) == [ONE] * 25
    stops = [index for index, frame in enumerate(frames) if isinstance(frame, TTSStoppedFrame)]
    assert len(stops) == 1
    assert levels(frames[: stops[0]]) == [ONE] * 30
    assert not any(isinstance(frame, TTSAudioRawFrame) for frame in frames)


def test_nothing_is_played_before_the_transport_is_ready():
    async def conversation() -> list[Frame]:
        with FakeAvatarServer() as server:
            service = LiveAvatarVideoService(server.url, image=SAMPLE_IMAGE)
            before: list[Frame] = [*spoken(tone(ONE, 30)), SleepFrame(0.7)]
            marker = TTSTextFrame("ready", "word")
            await_ready = [OutputTransportReadyFrame(), SleepFrame(2.0)]
            down, _ = await run_test(
                service, frames_to_send=[*before, *await_ready, marker], pipeline_params=PARAMS, start_timeout=30
            )
            return list(down)

    frames = run(conversation())
    ready = next(index for index, frame in enumerate(frames) if isinstance(frame, OutputTransportReadyFrame))
    assert not any(isinstance(frame, (OutputImageRawFrame, OutputAudioRawFrame)) for frame in frames[:ready])
    assert levels(frames) == [ONE] * 30


def test_a_pipeline_whose_transport_is_never_ready_ends():
    async def conversation() -> list[Frame]:
        with FakeAvatarServer() as server:
            service = LiveAvatarVideoService(server.url, image=SAMPLE_IMAGE)
            down, _ = await run_test(
                service, frames_to_send=spoken(tone(ONE, 30)), pipeline_params=PARAMS, start_timeout=30
            )
            return list(down)

    frames = run(conversation())
    assert [type(frame) for frame in frames] == [TTSStartedFrame, TTSStoppedFrame]


def test_an_interruption_stops_the_speech_and_the_next_one_is_whole():
    with FakeAvatarServer(delay_s=0.02) as server:
        kept = FunctionCallResultFrame("f", "id", {}, "result")
        kept.interruptible = False
        frames = through(
            LiveAvatarVideoService(server.url, image=SAMPLE_IMAGE),
            [
                *spoken(tone(ONE, 250)),
                kept,
                SleepFrame(3.0),
                InterruptionFrame(),
                *spoken(tone(TWO, 30)),
            ],
        )
    cut = next(index for index, frame in enumerate(frames) if isinstance(frame, InterruptionFrame))
    assert set(levels(frames[:cut])) == {ONE}
    assert 0 < len(levels(frames[:cut])) < 100
    assert levels(frames[cut:]) == [TWO] * 30
    pictures, sounds = media(frames)
    assert [loudness(sound) for sound in sounds] == [int(level) for level in pictures[:, 0, 0, 2]]
    assert frames.index(kept) == cut + 1, "a frame that no interruption may drop"
    assert sum(isinstance(frame, TTSStoppedFrame) for frame in frames) == 1, "that of the second speech"


def test_interruptions_while_nobody_speaks_do_not_stop_the_picture():
    with FakeAvatarServer() as server:
        turns = [frame for _ in range(10) for frame in (InterruptionFrame(), SleepFrame(0.1))]
        frames = through(LiveAvatarVideoService(server.url, image=SAMPLE_IMAGE), turns)
    pictures, _ = media(frames)
    assert len(pictures) > 10
    assert [int(number) for number in pictures[:, 0, 0, 0]] == list(range(len(pictures)))


def test_an_error_of_the_server_reaches_the_pipeline_and_the_voice_goes_on():
    with FakeAvatarServer(fail_at_block=4) as server:
        service = LiveAvatarVideoService(server.url, image=SAMPLE_IMAGE)
        witness = Witness(service)
        frames = through(service, spoken(tone(ONE, 75)), observers=[witness])
    assert len(witness.errors) == 1
    assert "the avatar has failed, and the voice goes on without it: the server ended" in witness.errors[0].error
    assert isinstance(witness.errors[0].exception, SessionFailed)
    assert not service.is_usable
    audio = [frame for frame in frames if isinstance(frame, OutputAudioRawFrame)]
    sounds = [loudness(np.frombuffer(frame.audio, np.int16)) for frame in audio]
    assert sounds.count(ONE) == 75
    assert isinstance(audio[-1], TTSAudioRawFrame)
    assert isinstance(frames[-1], TTSStoppedFrame)


def test_after_an_error_a_pipeline_can_be_interrupted_while_it_ends():
    async def conversation() -> list[type[Frame]]:
        with FakeAvatarServer(fail_at_block=2) as server:
            service = LiveAvatarVideoService(server.url, image=SAMPLE_IMAGE)
            transport = StubTransport(TransportParams(audio_out_enabled=True, **VIDEO_OUT))

            async def feed(worker: PipelineWorker) -> None:
                for frame in spoken(tone(ONE, 500)):
                    await worker.queue_frame(frame)
                await asyncio.sleep(1.5)
                await worker.queue_frame(EndFrame())
                await asyncio.sleep(0.3)
                await service.queue_frame(InterruptionFrame())

            witness = Witness(service)
            await play(service, transport, feed, witness)
            return [type(frame) for frame in witness.frames]

    kinds = run(conversation())
    assert kinds.index(InterruptionFrame) < kinds.index(EndFrame)
    assert TTSAudioRawFrame not in kinds[kinds.index(InterruptionFrame) :]


def test_after_an_error_speech_without_an_end_is_played_as_well():
    with FakeAvatarServer(fail_at_block=2) as server:
        service = LiveAvatarVideoService(server.url, image=SAMPLE_IMAGE)
        rest = TTSAudioRawFrame(tone(TWO, 5).tobytes(), RATE_HZ, 1)
        frames = through(service, [*spoken(tone(ONE, 50)), SleepFrame(4.0), rest, SleepFrame(1.5), InterruptionFrame()])
    audio = [frame for frame in frames if isinstance(frame, TTSAudioRawFrame)]
    assert [loudness(np.frombuffer(frame.audio, np.int16)) for frame in audio][-5:] == [TWO] * 5


def test_without_a_server_the_voice_passes_as_it_is():
    with FakeAvatarServer() as server:
        url = server.url
    service = LiveAvatarVideoService(url, image=SAMPLE_IMAGE, connect_timeout_s=60)
    witness = Witness(service)
    frames = through(service, spoken(tone(ONE, 30)), observers=[witness])
    assert len(witness.errors) == 1
    assert isinstance(witness.errors[0].exception, ConnectFailed)
    assert witness.errors[0].category is ErrorCategory.CONNECTIVITY
    audio = b"".join(frame.audio for frame in frames if isinstance(frame, TTSAudioRawFrame))
    assert audio == tone(ONE, 30).tobytes()


def test_the_end_of_the_pipeline_waits_for_the_speech_and_frees_the_session():
    with FakeAvatarServer() as server:
        frames = through(LiveAvatarVideoService(server.url, image=SAMPLE_IMAGE), spoken(tone(ONE, 60)))
        assert server.sessions[0].ended
    assert levels(frames) == [ONE] * 60


def test_sound_that_is_no_sound_is_reported_and_the_next_is_played():
    with FakeAvatarServer() as server:
        service = LiveAvatarVideoService(server.url, image=SAMPLE_IMAGE)
        witness = Witness(service)
        wrong = [TTSAudioRawFrame(b"abc", RATE_HZ, 1), TTSAudioRawFrame(bytes(4), 0, 1)]
        frames = through(service, [*wrong, *spoken(tone(ONE, 20))], observers=[witness])
    assert ["pass int16 samples" in witness.errors[0].error, "pass 4000 to" in witness.errors[1].error] == [True] * 2
    assert levels(frames) == [ONE] * 20


def test_wrong_options_are_refused_at_once():
    with pytest.raises(InvalidInput, match="seed is -1"):
        LiveAvatarVideoService("localhost:8001", image=SAMPLE_IMAGE, seed=-1)
