"""Gives an agent of LiveKit Agents a face: a VideoGenerator, and a worker that publishes it (extra `livekit`)."""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, Final, Unpack

import numpy as np

try:
    from livekit import rtc
    from livekit.agents import AgentSession, ErrorEvent
    from livekit.agents.voice.avatar import (
        AudioReceiver,
        AudioSegmentEnd,
        AvatarRunner,
        QueueAudioOutput,
        VideoGenerator,
    )
    from livekit.agents.voice.avatar import AvatarOptions as RunnerOptions
except ImportError as error:
    raise ImportError(
        "live_avatar_client.livekit needs LiveKit Agents; install it with: pip install 'live-avatar-client[livekit]'"
    ) from error

from .conversation import AvatarConversation, AvatarOptions
from .errors import AvatarError, SessionClosed
from .playout import Mark, Tick, mono, require_sound_rate
from .protocol import FPS

DEFAULT_SOUND_RATE_HZ: Final = 24_000

_LONGEST_PUSH_S: Final = 0.5
"""How long a clear waits for the player to take the frame that it has been given."""

_STALL_S: Final = 0.1
"""After this time without a frame the player's queues have run dry, or nearly."""

logger = logging.getLogger(__name__)


class _Silence(rtc.AudioFrame):
    """Sound that is played while nobody speaks.

    Without it the audio queue of the AvatarRunner would be empty when speech begins, and the sound would come before
    its picture, which waits in the video queue. The runner adds up the durations of what it plays, which must be those
    of speech alone.
    """

    @property
    def duration(self) -> float:
        return 0.0


class LiveAvatarGenerator(VideoGenerator):
    """A VideoGenerator for the AvatarRunner of LiveKit Agents, or a player of your own.

    It yields a video frame and then its 40 ms of audio, 25 times a second if the player takes them, also while nobody
    speaks; then the audio is silence with the duration 0. Every segment of which audio was pushed gives one
    AudioSegmentEnd, after its last frame, unless it was cleared. When the server fails, `on_error` is called, and the
    speech goes on without pictures.
    """

    def __init__(
        self, url: str, *, sound_rate_hz: int = DEFAULT_SOUND_RATE_HZ, **options: Unpack[AvatarOptions]
    ) -> None:
        """Check the options; `start` connects.

        Args:
            url: the address of the Live Avatar server.
            sound_rate_hz: the rate of the yielded audio; audio of any rate may be pushed.
            options: as those of `live_avatar_client.AsyncAvatarSession`; `image` is required.
        """
        require_sound_rate(sound_rate_hz)
        self.sound_rate_hz = sound_rate_hz
        self.on_clear: Callable[[], Awaitable[None]] | None = None
        """Awaited at each clear: empties the player's queues."""
        self.on_stall: Callable[[], Awaitable[None]] | None = None
        """Awaited before a frame that comes more than 0.1 s after the last one: lets sound and picture begin anew."""
        self._conversation = AvatarConversation(url, **options)
        self._segment_open = False
        self._returned = asyncio.Event()
        """Set while the player has no frame that it has not taken yet."""
        self._returned.set()
        self._clears = 0
        self._clears_under_way = 0
        self._cleared = asyncio.Event()
        self._cleared.set()

    @property
    def frame_size(self) -> tuple[int, int]:
        """Width and height of the video; known after `start`."""
        if self._conversation.frame_size is None:
            raise SessionClosed("the size of the video is not known before start(); await it first")
        return self._conversation.frame_size

    @property
    def error(self) -> Exception | None:
        """Why the avatar's session has failed."""
        return self._conversation.error

    def on_error(self, callback: Callable[[Exception], None]) -> None:
        """Have `callback` called if the session fails after `start`."""
        self._conversation.on_error = callback

    async def start(self) -> None:
        """Connect, and wait for the first picture; raises the client's errors."""
        await self._conversation.open(self.sound_rate_hz)

    async def aclose(self) -> None:
        """Free the session; the iteration ends."""
        await self._conversation.close()

    async def push_audio(self, frame: rtc.AudioFrame | AudioSegmentEnd) -> None:
        """Take a piece of speech, or the end of its segment; never waits."""
        if isinstance(frame, rtc.AudioFrame):
            pcm = mono(frame.data, frame.num_channels)
            self._segment_open = True  # also without samples: whoever pushed them waits for the end
            self._conversation.push(pcm, frame.sample_rate)
        elif self._segment_open:
            self._segment_open = False
            self._conversation.finish()
            self._conversation.mark(frame)
        # Else it is the end of a segment that was cleared, and would end the next one.

    def clear_buffer(self) -> Coroutine[None, None, None]:
        """Drop the speech at once; the coroutine ends when the player has nothing of it any more.

        No frame is yielded meanwhile: the AvatarRunner then sets its position to 0, which must not include the next
        segment's audio, nor begin with the old one's.
        """
        self._segment_open = False
        self._conversation.interrupt()
        self._clears += 1
        return self._finish_clear()

    async def _finish_clear(self) -> None:
        self._clears_under_way += 1
        self._cleared.clear()
        try:
            if self.on_clear is not None:
                await self.on_clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LONGEST_PUSH_S):
                    await self._returned.wait()
        finally:
            self._clears_under_way -= 1
            if not self._clears_under_way:
                self._cleared.set()

    async def __aiter__(self) -> AsyncIterator[rtc.VideoFrame | rtc.AudioFrame | AudioSegmentEnd]:
        """Yield video and audio frames, and ends of segments, until `aclose`."""
        try:
            yielded_at_s = math.inf
            while True:
                item = await self._conversation.next()
                clears = self._clears
                if self.on_stall is not None and time.monotonic() - yielded_at_s > _STALL_S:
                    await self.on_stall()
                yielded_at_s = time.monotonic()
                for frame in self._frames(item):
                    await self._cleared.wait()
                    if self._clears != clears:
                        break  # a clear came while the player took the picture
                    self._returned.clear()
                    yield frame
                    self._returned.set()
        except SessionClosed:
            return
        finally:
            self._returned.set()

    def _frames(self, item: Tick | Mark) -> list[rtc.VideoFrame | rtc.AudioFrame | AudioSegmentEnd]:
        if isinstance(item, Mark):
            return [AudioSegmentEnd()]
        frames: list[rtc.VideoFrame | rtc.AudioFrame | AudioSegmentEnd] = []
        if item.pixels is not None:
            height, width = item.pixels.shape[:2]
            frames.append(rtc.VideoFrame(width, height, rtc.VideoBufferType.RGB24, item.pixels.tobytes()))
        rate_hz = self.sound_rate_hz
        if item.sound is None:
            silence = np.zeros(rate_hz // FPS, np.int16)
            frames.append(_Silence(silence.tobytes(), rate_hz, 1, len(silence)))
        else:
            frames.append(rtc.AudioFrame(item.sound.tobytes(), rate_hz, 1, len(item.sound)))
        return frames


class _AgentVoice(QueueAudioOutput):
    """The audio output of an agent, which does not wait for the end of its speech when the worker is closed."""

    _closed = False
    _finished_segments = 0

    def on_playback_finished(
        self, *, playback_position: float, interrupted: bool, synchronized_transcript: str | None = None
    ) -> None:
        self._finished_segments += 1
        super().on_playback_finished(
            playback_position=playback_position,
            interrupted=interrupted,
            synchronized_transcript=synchronized_transcript,
        )

    def flush(self) -> None:
        super().flush()
        if self._closed:
            self._give_up()

    def clear_buffer(self) -> None:
        if self._closed:
            self._give_up()  # the runner, which would report it, is closed too
        else:
            super().clear_buffer()

    def close(self) -> None:
        """Report all speech that is not played, and all that comes later, as interrupted."""
        self._closed = True
        self._give_up()

    def _give_up(self) -> None:
        while self._finished_segments < self.captured_playout_segments:
            self.on_playback_finished(playback_position=0.0, interrupted=True)


class AvatarWorker:
    """Publishes the avatar of an agent in its room, with the agent's voice.

    In the agent's own process:

        avatar = AvatarWorker("localhost:8001", image="person.png")
        await avatar.start(ctx.room, session)
        await session.start(agent, room=ctx.room)

    In a process of its own: `start(room, audio=DataStreamAudioReceiver(room))`, while the agent's process sets
    `session.output.audio` to a DataStreamAudioOutput.
    """

    def __init__(
        self, url: str, *, sound_rate_hz: int = DEFAULT_SOUND_RATE_HZ, **options: Unpack[AvatarOptions]
    ) -> None:
        """Check the options, which are those of `LiveAvatarGenerator`."""
        self.generator = LiveAvatarGenerator(url, sound_rate_hz=sound_rate_hz, **options)
        self.runner: AvatarRunner | None = None
        self._session: AgentSession[Any] | None = None
        self._output: _AgentVoice | None = None

    async def start(
        self, room: rtc.Room, session: AgentSession[Any] | None = None, *, audio: AudioReceiver | None = None
    ) -> None:
        """Connect the avatar, and speak what the session says, or what `audio` receives.

        The tracks are published with the first picture. Raises the client's errors: no server, a full one, a bad image.
        A failure after that is an `error` event of the session, whose source is this worker.
        """
        output = _AgentVoice(sample_rate=self.generator.sound_rate_hz, wait_playback_start=True)
        await self.generator.start()
        width, height = self.generator.frame_size
        runner = AvatarRunner(
            room,
            audio_recv=audio or output,
            video_gen=self.generator,
            options=RunnerOptions(width, height, FPS, self.generator.sound_rate_hz, 1),
        )
        self.generator.on_clear = runner.av_sync.clear_queue
        self.generator.on_stall = partial(_begin_again, runner.av_sync)
        self.generator.on_error(self._report)
        try:
            await runner.start()
        except BaseException:  # its own aclose() needs a start
            await runner.av_sync.aclose()
            await self.generator.aclose()
            raise
        self.runner = runner
        if session is not None:
            self._session, self._output = session, output
            session.output.audio = output

    async def wait_for_complete(self) -> None:
        """Wait until the worker is closed; raises what has stopped it."""
        if self.runner is None:
            raise AvatarError("the avatar worker was not started; await start() first")
        await self.runner.wait_for_complete()

    async def aclose(self) -> None:
        """Free the avatar's session, and end the tasks; may be called at any time, and again.

        What the agent says after that is heard by nobody.
        """
        if self.runner is not None:
            runner, self.runner = self.runner, None
            self.generator.on_clear = self.generator.on_stall = None
            await runner.aclose()
        await self.generator.aclose()
        if self._output is not None:
            self._output.close()

    def _report(self, error: Exception) -> None:
        logger.error("the avatar has failed, and the voice goes on without it: %s", error)
        if self._session is not None:
            self._session.emit("error", ErrorEvent(error=error, source=self))


async def _begin_again(av_sync: rtc.AVSynchronizer) -> None:
    """Have the synchronizer forget its schedule.

    After a stall it would show pictures faster until they are on time again, while their sound is played as it was.
    A reset while it waits to show a picture would end its task.
    """
    await av_sync.wait_for_playout()
    av_sync.reset()
