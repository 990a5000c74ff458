"""LiveKit Agents' own AvatarRunner and audio output play the avatar; only the room is a stub."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import numpy as np
import pytest
from livekit import rtc
from livekit.agents import AgentSession, ErrorEvent
from livekit.agents.voice.avatar import (
    AudioReceiver,
    AudioSegmentEnd,
    DataStreamAudioOutput,
    DataStreamAudioReceiver,
    QueueAudioOutput,
)
from livekit.agents.voice.io import PlaybackFinishedEvent, PlaybackStartedEvent

from live_avatar_client import ConnectFailed, InvalidInput, SessionClosed, SessionFailed, SessionRefused
from live_avatar_client.livekit import AvatarWorker, LiveAvatarGenerator
from live_avatar_client.testing import SAMPLE_IMAGE, FakeAvatarServer
from tests.integrations.conftest import LONGEST_SESSION_S
from tests.integrations.players import EARLY_S, Samples, chunks, direct_frames, loudness, run, speech, tone
from tests.integrations.rooms import StubRoom, linked

RATE_HZ = 16_000
ONE, TWO = 40, 80
"""Levels of tones: the first and the second speech."""
Item = rtc.VideoFrame | rtc.AudioFrame | AudioSegmentEnd


class Player:
    """An AvatarWorker in a stub room, with what it has put into LiveKit's sources, and when that is played."""

    def __init__(self, url: str, image: bytes = SAMPLE_IMAGE, rate_hz: int = RATE_HZ) -> None:
        self.worker = AvatarWorker(url, image=image, sound_rate_hz=rate_hz)
        self.output = QueueAudioOutput(sample_rate=rate_hz, wait_playback_start=True)
        self.room = StubRoom()
        self.pictures: list[tuple[float, np.ndarray[Any, Any]]] = []
        self.sounds: list[tuple[float, rtc.AudioFrame]] = []
        self.events: list[PlaybackFinishedEvent | PlaybackStartedEvent] = []
        self.output.on("playback_started", self.events.append)
        self.output.on("playback_finished", self.events.append)
        self._rate_hz = rate_hz

    async def start(self, audio: AudioReceiver | None = None) -> None:
        await self.worker.start(cast(rtc.Room, self.room), audio=audio or self.output)
        runner: Any = self.worker.runner
        video, audio = runner._video_source, runner._audio_source
        show, play = video.capture_frame, audio.capture_frame

        def shown(frame: rtc.VideoFrame) -> None:
            pixels = np.frombuffer(frame.data, np.uint8).reshape(frame.height, frame.width, 3)
            self.pictures.append((time.monotonic(), pixels))
            show(frame)

        async def played(frame: rtc.AudioFrame) -> None:
            self.sounds.append((time.monotonic() + audio.queued_duration, frame))
            await play(frame)

        video.capture_frame, audio.capture_frame = shown, played

    async def say(self, samples: Samples, *, flush: bool = True) -> None:
        for chunk in chunks(samples):
            await self.output.capture_frame(rtc.AudioFrame(chunk.tobytes(), self._rate_hz, 1, len(chunk)))
        if flush:
            self.output.flush()

    async def until_level(self, level: int) -> None:
        """Wait until sound of a tone is played."""
        while not any(level == loudness(samples(frame)) for _, frame in self.sounds):
            await asyncio.sleep(0.005)


def samples(frame: rtc.AudioFrame) -> Samples:
    return np.frombuffer(frame.data, np.int16)


@asynccontextmanager
async def player(url: str, image: bytes = SAMPLE_IMAGE, rate_hz: int = RATE_HZ) -> AsyncIterator[Player]:
    started = Player(url, image, rate_hz)
    await started.start()
    try:
        yield started
    finally:
        await started.worker.aclose()


@asynccontextmanager
async def generator(
    url: str, image: bytes = SAMPLE_IMAGE, rate_hz: int = RATE_HZ
) -> AsyncIterator[LiveAvatarGenerator]:
    started = LiveAvatarGenerator(url, image=image, sound_rate_hz=rate_hz)
    await started.start()
    try:
        yield started
    finally:
        await started.aclose()


async def push(avatar: LiveAvatarGenerator, pcm: Samples, rate_hz: int = RATE_HZ, channels: int = 1) -> None:
    for chunk in chunks(pcm):
        frame = rtc.AudioFrame(np.repeat(chunk, channels).tobytes(), rate_hz, channels, len(chunk))
        await avatar.push_audio(frame)


async def until_ends(avatar: LiveAvatarGenerator, ends: int) -> list[Item]:
    """What it yields until so many segments have ended."""
    items: list[Item] = []
    async for item in avatar:
        items.append(item)
        ends -= isinstance(item, AudioSegmentEnd)
        if not ends:
            break
    return items


def paired(items: list[Item]) -> tuple[np.ndarray[Any, Any], list[Samples | None]]:
    """The frames, uint8 [n, H, W, 3], and the sound that follows each; None for the silence between speeches."""
    media = [item for item in items if not isinstance(item, AudioSegmentEnd)]
    pictures, sounds = media[::2], media[1::2]
    assert all(isinstance(picture, rtc.VideoFrame) for picture in pictures)
    frames = np.stack(
        [np.frombuffer(picture.data, np.uint8).reshape(picture.height, picture.width, 3) for picture in pictures]
    )
    heard: list[Samples | None] = []
    for sound in sounds:
        assert isinstance(sound, rtc.AudioFrame)
        heard.append(samples(sound) if sound.duration else None)
    return frames, heard


def spoken_levels(frames: np.ndarray[Any, Any]) -> list[int]:
    """The levels of the fake server's frames that show speech."""
    return [int(level) for level in frames[:, 0, 0, 2] if level]


# On the real server


def test_every_frame_comes_in_order_with_its_sound(triton: str, portrait: bytes):
    """A plain session that is sent the same sound gives the same pixels: two segments, and idle frames around them."""
    first, second = speech(2.3), speech(3.1)[-20_000:]

    async def conversation() -> list[Item]:
        async with generator(triton, portrait) as avatar:
            await push(avatar, first)
            await avatar.push_audio(AudioSegmentEnd())
            items = await until_ends(avatar, 1)
            await push(avatar, second)
            await avatar.push_audio(AudioSegmentEnd())
            return items + await until_ends(avatar, 1)

    items = run(conversation())
    frames, sounds = paired(items)
    assert sum(isinstance(item, AudioSegmentEnd) for item in items) == 2
    said = np.concatenate([sound for sound in sounds if sound is not None])
    np.testing.assert_array_equal(said, np.concatenate((first, second)))
    assert isinstance(items[-1], AudioSegmentEnd)
    assert sounds[-1] is not None, "the segment ends right after its last frame"
    np.testing.assert_array_equal(frames, direct_frames(triton, portrait, sounds))


def test_the_lips_move_with_speech_of_24_khz(triton: str, portrait: bytes):
    """The frames are those of the same speech at 16 kHz, and of no other time."""
    said = speech(3.0)

    async def conversation() -> list[Item]:
        async with generator(triton, portrait, 24_000) as avatar:
            await push(avatar, speech(3.0, 24_000), 24_000)
            await avatar.push_audio(AudioSegmentEnd())
            return await until_ends(avatar, 1)

    frames, sounds = paired(run(conversation()))
    speaking = [index for index, sound in enumerate(sounds) if sound is not None]
    assert len(speaking) == 75
    start = speaking[0]
    silence: list[Samples | None] = [None] * start
    truth = direct_frames(triton, portrait, [*silence, *(said[i : i + 640] for i in range(0, len(said), 640))])

    def distance(lag: int) -> float:
        shifted = frames[start + 2 + lag : len(frames) - 2 + lag].astype(float)
        return float(np.abs(shifted - truth[start + 2 : -2]).mean())

    distances = {lag: distance(lag) for lag in (-2, -1, 0, 1, 2)}
    assert min(distances, key=lambda lag: distances[lag]) == 0, distances
    assert distances[0] < 0.5 * min(distances[-1], distances[1]), distances


def test_the_runner_plays_sound_and_picture_at_the_same_time(triton: str, portrait: bytes):
    async def conversation() -> Player:
        async with player(triton, portrait, 24_000) as playing:
            await asyncio.sleep(1.0)
            await playing.say(speech(2.5, 24_000))
            await playing.output.wait_for_playout()
            await asyncio.sleep(0.3)  # the runner tells the end while the last pictures are in its queue
            return playing

    playing = run(conversation())
    assert len(playing.room.tracks) == 2
    pairs = list(zip(playing.pictures, playing.sounds, strict=False))
    speaking = [(sound_s - shown_s) for (shown_s, _), (sound_s, frame) in pairs if frame.duration]
    assert len(speaking) == 63
    assert abs(float(np.median(speaking))) < EARLY_S, speaking
    started, finished = playing.events
    assert isinstance(started, PlaybackStartedEvent)
    assert isinstance(finished, PlaybackFinishedEvent)
    assert finished.playback_position == pytest.approx(2.5)
    assert not finished.interrupted


def test_an_error_of_the_real_server_in_mid_segment_reaches_the_agent(impatient_triton: str, portrait: bytes):
    said = np.tile(speech(6.0), 2)

    async def conversation() -> tuple[list[ErrorEvent], PlaybackFinishedEvent]:
        worker = AvatarWorker(impatient_triton, image=portrait, sound_rate_hz=RATE_HZ)
        session: AgentSession[None] = AgentSession()
        errors: list[ErrorEvent] = []
        session.on("error", errors.append)
        await worker.start(cast(rtc.Room, StubRoom()), session)
        output = session.output.audio
        assert output is not None
        for chunk in chunks(said):
            await output.capture_frame(rtc.AudioFrame(chunk.tobytes(), RATE_HZ, 1, len(chunk)))
        output.flush()
        finished = await output.wait_for_playout()
        await worker.aclose()
        return errors, finished

    errors, finished = run(conversation())
    assert [type(event.error) for event in errors] == [SessionFailed]
    assert f"has lasted {LONGEST_SESSION_S} s, the longest that this server allows" in str(errors[0].error)
    assert finished.playback_position == pytest.approx(len(said) / RATE_HZ)


def test_a_picture_that_the_server_refuses_ends_the_start(triton: str):
    with pytest.raises(SessionRefused, match="the server refused the session") as caught:
        run(LiveAvatarGenerator(triton, image=b"\x89PNG\r\n\x1a\n" + bytes(100)).start())
    assert caught.value.code == "INVALID_ARGUMENT"


# The contract, on a server whose frames say which speech they show


def test_an_interruption_stops_the_speech_and_the_next_one_is_whole():
    async def conversation() -> tuple[Player, int]:
        with FakeAvatarServer(delay_s=0.02) as server:
            async with player(server.url) as playing:
                await playing.say(tone(ONE, 250))
                await playing.until_level(ONE)
                await asyncio.sleep(0.3)
                playing.output.clear_buffer()
                await playing.output.wait_for_playout()
                before = len(playing.sounds)
                await playing.say(tone(TWO, 30))
                await playing.output.wait_for_playout()
                await asyncio.sleep(0.3)  # the runner tells the end while the last pictures are in its queue
                return playing, before

    playing, before = run(conversation())
    after = [frame for _, frame in playing.sounds[before:] if frame.duration]
    assert {loudness(samples(frame)) for frame in after} == {TWO}
    assert spoken_levels(np.stack([pixels for _, pixels in playing.pictures]))[-30:] == [TWO] * 30
    kinds = [type(event) for event in playing.events]
    assert kinds == [PlaybackStartedEvent, PlaybackFinishedEvent] * 2
    interrupted, finished = playing.events[1::2]
    assert isinstance(interrupted, PlaybackFinishedEvent)
    assert isinstance(finished, PlaybackFinishedEvent)
    assert interrupted.interrupted
    assert 0 < interrupted.playback_position < 5
    assert (finished.interrupted, finished.playback_position) == (False, pytest.approx(30 * 0.04))


def test_the_late_end_of_a_cleared_segment_does_not_end_the_next_one():
    async def conversation() -> list[Item]:
        with FakeAvatarServer() as server:
            async with generator(server.url) as avatar:
                await push(avatar, tone(ONE, 60))
                await avatar.clear_buffer()
                await avatar.push_audio(AudioSegmentEnd())  # of the cleared segment
                await push(avatar, tone(TWO, 30))
                await asyncio.sleep(0.2)
                await avatar.push_audio(AudioSegmentEnd())
                return await until_ends(avatar, 1)

    items = run(conversation())
    frames, sounds = paired(items)
    assert [loudness(sound) for sound in sounds if sound is not None] == [TWO] * 30
    assert [int(level) for level in frames[-30:, 0, 0, 2]] == [TWO] * 30


def test_the_end_of_a_segment_that_was_given_before_the_clear_is_cleared_with_it():
    async def conversation() -> list[Item]:
        with FakeAvatarServer() as server:
            async with generator(server.url) as avatar:
                await push(avatar, tone(ONE, 60))
                await avatar.push_audio(AudioSegmentEnd())
                await avatar.clear_buffer()
                await push(avatar, tone(TWO, 30))
                await avatar.push_audio(AudioSegmentEnd())
                return await until_ends(avatar, 1)

    _, sounds = paired(run(conversation()))
    assert [loudness(sound) for sound in sounds if sound is not None] == [TWO] * 30


def test_a_worker_in_a_process_of_its_own_speaks_what_the_agent_sends():
    """Over LiveKit's data streams, which end a cleared segment late."""

    async def conversation() -> tuple[list[PlaybackFinishedEvent], list[Samples]]:
        with FakeAvatarServer() as server:
            agent, avatar = linked(StubRoom("agent"), StubRoom("avatar"))
            playing = Player(server.url)
            output = DataStreamAudioOutput(agent, destination_identity="avatar", wait_playback_start=True)
            receiver = DataStreamAudioReceiver(avatar)
            playing.room = avatar
            finished: list[PlaybackFinishedEvent] = []
            output.on("playback_finished", finished.append)

            async def send(pcm: Samples) -> None:
                for chunk in chunks(pcm):
                    await output.capture_frame(rtc.AudioFrame(chunk.tobytes(), RATE_HZ, 1, len(chunk)))

            await playing.start(receiver)
            await send(tone(ONE, 100))
            await playing.until_level(ONE)
            output.clear_buffer()
            output.flush()
            await output.wait_for_playout()
            before = len(playing.sounds)
            await send(tone(TWO, 30))
            output.flush()
            await output.wait_for_playout()
            await playing.worker.aclose()
            return finished, [samples(frame) for _, frame in playing.sounds[before:] if frame.duration]

    finished, said = run(conversation())
    assert [event.interrupted for event in finished] == [True, False]
    assert finished[1].playback_position == pytest.approx(30 * 0.04)
    assert [loudness(sound) for sound in said] == [TWO] * 30


def test_after_a_clear_nothing_is_left_in_the_runners_queues():
    """The AvatarRunner alone would play 100 ms more."""

    async def conversation() -> tuple[float, float]:
        with FakeAvatarServer() as server:
            async with player(server.url) as playing:
                runner: Any = playing.worker.runner
                await playing.say(tone(ONE, 100))
                await playing.until_level(ONE)
                while (queued_s := runner._audio_source.queued_duration) < 0.05:
                    await asyncio.sleep(0.001)
                await playing.worker.generator.clear_buffer()
                return queued_s, runner._audio_source.queued_duration

    queued_s, left_s = run(conversation())
    assert queued_s >= 0.05
    assert left_s == 0


@pytest.mark.parametrize("block_s", [0.1, 0.55])
def test_sound_and_picture_stay_together_after_stalls(block_s: float):
    """The agent's process stands still, or the server needs more than the 0.48 s that its blocks last."""

    async def conversation() -> Player:
        with FakeAvatarServer(delay_s=block_s) as server:
            async with player(server.url) as playing:
                await playing.say(tone(ONE, 100))
                await playing.until_level(ONE)
                await asyncio.sleep(0.5)
                time.sleep(0.3)
                await playing.output.wait_for_playout()
                await asyncio.sleep(0.3)
                return playing

    playing = run(conversation())
    shown = [shown_s for shown_s, pixels in playing.pictures if pixels[0, 0, 2] == ONE]
    played = [played_s for played_s, frame in playing.sounds if frame.duration]
    assert len(shown) == len(played) == 100
    apart = np.abs(np.subtract(played, shown))
    assert float(np.median(apart[50:])) < EARLY_S, apart
    assert float(np.median(apart)) < EARLY_S, apart


def test_positions_count_the_speech_that_was_yielded_and_nothing_else():
    """Neither silence, nor a frame that the runner was playing when the clear came."""

    async def conversation() -> list[PlaybackFinishedEvent | PlaybackStartedEvent]:
        with FakeAvatarServer() as server:
            async with player(server.url) as playing:
                for round_ in range(4):
                    await playing.say(tone(ONE + round_, 100), flush=False)
                    await playing.until_level(ONE + round_)
                    await asyncio.sleep(0.05 + 0.013 * round_)
                    playing.output.clear_buffer()
                    playing.output.flush()
                    await playing.say(tone(TWO + round_, 10))
                    await playing.output.wait_for_playout()
                return playing.events

    events = run(conversation())
    assert [type(event) for event in events] == [PlaybackStartedEvent, PlaybackFinishedEvent] * 8
    finished = [event for event in events if isinstance(event, PlaybackFinishedEvent)]
    assert [event.interrupted for event in finished] == [True, False] * 4
    assert [event.playback_position for event in finished[1::2]] == [pytest.approx(0.4)] * 4
    assert all(0.04 <= event.playback_position < 1.5 for event in finished[::2])


def test_no_piece_of_sound_is_longer_than_its_frame_and_the_last_is_not_padded():
    """The runner's queue holds 100 ms."""

    async def conversation() -> list[Item]:
        with FakeAvatarServer() as server:
            async with generator(server.url, rate_hz=48_000) as avatar:
                await push(avatar, speech(0.93, 48_000), 48_000)
                await avatar.push_audio(AudioSegmentEnd())
                return await until_ends(avatar, 1)

    sounds = [item for item in run(conversation()) if isinstance(item, rtc.AudioFrame)]
    assert {sound.samples_per_channel / sound.sample_rate for sound in sounds[:-1]} == {0.04}
    assert sum(sound.duration for sound in sounds) == pytest.approx(0.93)


def test_the_avatar_moves_while_nobody_speaks():
    async def conversation() -> Player:
        with FakeAvatarServer() as server:
            async with player(server.url) as playing:
                while len(playing.pictures) < 40:
                    await asyncio.sleep(0.05)
                return playing

    playing = run(conversation())
    numbers = [int(pixels[0, 0, 0]) for _, pixels in playing.pictures]
    assert numbers == list(range(len(numbers)))
    assert playing.events == []


def test_speech_in_stereo_at_any_rate_is_taken():
    async def conversation() -> list[Item]:
        with FakeAvatarServer() as server:
            async with generator(server.url) as avatar:
                await push(avatar, speech(1.0, 44_100), 44_100, channels=2)
                await avatar.push_audio(AudioSegmentEnd())
                return await until_ends(avatar, 1)

    _, sounds = paired(run(conversation()))
    said = np.concatenate([sound for sound in sounds if sound is not None])
    assert len(said) == 16_000
    assert np.corrcoef(said, speech(1.0))[0, 1] > 0.99


@pytest.mark.parametrize("lookahead_frames", [5, 100])
def test_a_server_that_looks_ahead_is_asked_for_more(lookahead_frames: int):
    async def conversation() -> list[Item]:
        with FakeAvatarServer(lookahead_frames=lookahead_frames) as server:
            async with generator(server.url) as avatar:
                await push(avatar, tone(ONE, 40))
                await avatar.push_audio(AudioSegmentEnd())
                return await until_ends(avatar, 1)

    frames, sounds = paired(run(conversation()))
    assert [loudness(sound) if sound is not None else 0 for sound in sounds] == list(frames[:, 0, 0, 2])


def test_an_error_of_the_server_reaches_the_agent_and_the_voice_goes_on():
    async def conversation() -> tuple[list[ErrorEvent], Player]:
        with FakeAvatarServer(fail_at_block=5) as server:
            playing = Player(server.url)
            session: AgentSession[None] = AgentSession()
            errors: list[ErrorEvent] = []
            session.on("error", errors.append)
            await playing.worker.start(cast(rtc.Room, playing.room), session)
            assert session.output.audio is not None
            playing.output = cast(Any, session.output.audio)
            playing.output.on("playback_finished", playing.events.append)
            await playing.say(tone(ONE, 125))
            await playing.output.wait_for_playout()
            await playing.worker.aclose()
            return errors, playing

    errors, playing = run(conversation())
    assert len(errors) == 1
    assert isinstance(errors[0].error, SessionFailed)
    assert "the server ended the session: " in str(errors[0].error)
    assert errors[0].source is playing.worker
    finished = playing.events[-1]
    assert isinstance(finished, PlaybackFinishedEvent)
    assert (finished.playback_position, finished.interrupted) == (pytest.approx(5.0), False)


def test_a_server_that_is_full_or_away_ends_the_start():
    async def start(url: str) -> None:
        worker = AvatarWorker(url, image=SAMPLE_IMAGE, connect_timeout_s=60)
        try:
            await worker.start(cast(rtc.Room, StubRoom()))
        finally:
            await worker.aclose()

    with FakeAvatarServer(refuse="all 1 sessions are taken") as server:
        with pytest.raises(SessionRefused, match="the server refused the session: all 1 sessions are taken"):
            run(start(server.url))
        url = server.url
    with pytest.raises(ConnectFailed, match="no server answered at"):
        run(start(url))


def test_closing_leaves_no_task_and_frees_the_session():
    async def conversation() -> None:
        with FakeAvatarServer() as server:
            never_started = AvatarWorker(server.url, image=SAMPLE_IMAGE)
            await never_started.aclose()
            async with player(server.url) as playing:
                await playing.say(tone(ONE, 100))
                await playing.until_level(ONE)
            await playing.worker.aclose()
            assert server.sessions[0].ended
            assert server.sessions[0].end_reason == "abandoned"

    run(conversation())  # it checks that no task is left


def test_an_agent_that_speaks_while_its_avatar_is_closed_does_not_wait_for_ever():
    async def conversation() -> list[bool]:
        with FakeAvatarServer() as server:
            worker = AvatarWorker(server.url, image=SAMPLE_IMAGE, sound_rate_hz=RATE_HZ)
            session: AgentSession[None] = AgentSession()
            await worker.start(cast(rtc.Room, StubRoom()), session)
            output = session.output.audio
            assert output is not None
            interrupted = []
            for close in (True, False):
                for chunk in chunks(tone(ONE, 100)):
                    await output.capture_frame(rtc.AudioFrame(chunk.tobytes(), RATE_HZ, 1, len(chunk)))
                output.flush()
                if close:
                    await asyncio.sleep(1.0)
                    await worker.aclose()
                output.clear_buffer()
                interrupted.append((await output.wait_for_playout()).interrupted)
            return interrupted

    assert run(conversation()) == [True, True]


def test_a_segment_without_samples_ends_as_well():
    """The agent waits for it."""

    async def conversation() -> PlaybackFinishedEvent:
        with FakeAvatarServer() as server:
            async with player(server.url) as playing:
                await playing.output.capture_frame(rtc.AudioFrame(b"", RATE_HZ, 1, 0))
                playing.output.flush()
                return await playing.output.wait_for_playout()

    assert run(conversation()) == PlaybackFinishedEvent(playback_position=0.0, interrupted=False)


def test_a_start_that_fails_in_the_room_leaves_nothing_behind():
    class Elsewhere(QueueAudioOutput):
        async def start(self) -> None:
            raise RuntimeError("room is not connected")

    async def conversation() -> None:
        with FakeAvatarServer() as server:
            worker = AvatarWorker(server.url, image=SAMPLE_IMAGE)
            with pytest.raises(RuntimeError, match="room is not connected"):
                await worker.start(cast(rtc.Room, StubRoom()), audio=Elsewhere())
            await worker.aclose()
            await asyncio.sleep(0)
            assert server.sessions[0].ended

    run(conversation())


def test_what_comes_before_the_start_is_refused_and_after_the_end_is_ignored():
    async def conversation() -> None:
        with FakeAvatarServer() as server:
            avatar = LiveAvatarGenerator(server.url, image=SAMPLE_IMAGE)
            with pytest.raises(SessionClosed, match="the conversation is not open yet; await its start first"):
                await push(avatar, tone(ONE, 5))
            with pytest.raises(SessionClosed, match="the size of the video is not known before start"):
                _ = avatar.frame_size
            await avatar.start()
            await avatar.aclose()
            await push(avatar, tone(ONE, 5))
            await avatar.push_audio(AudioSegmentEnd())
            await avatar.clear_buffer()
            assert [item async for item in avatar] == []

    run(conversation())


def test_wrong_options_are_refused_at_once():
    with pytest.raises(InvalidInput, match="the sound's rate is 22051 Hz; pass a multiple of 25"):
        AvatarWorker("localhost:8001", image=SAMPLE_IMAGE, sound_rate_hz=22_051)
    with pytest.raises(InvalidInput, match="seed is -1"):
        AvatarWorker("localhost:8001", image=SAMPLE_IMAGE, seed=-1)
