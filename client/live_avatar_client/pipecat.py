"""Gives a bot of Pipecat a face: a service that turns the speech of the TTS into video and sound (extra `pipecat`)."""

import asyncio
import contextlib
import time
from collections.abc import Iterable
from typing import Any, Final, Unpack, cast

import numpy as np

try:
    from pipecat.frames.frames import (
        CancelFrame,
        ControlFrame,
        DataFrame,
        EndFrame,
        Frame,
        InterruptionFrame,
        OutputImageRawFrame,
        OutputTransportReadyFrame,
        SpeechOutputAudioRawFrame,
        StartFrame,
        StopFrame,
        TTSAudioRawFrame,
        TTSStoppedFrame,
    )
    from pipecat.processors.frame_processor import FrameDirection, FrameProcessorSetup
    from pipecat.services.ai_service import AIService
    from pipecat.services.settings import ServiceSettings
    from pipecat.utils.errors import ErrorCategory
except ImportError as error:
    raise ImportError(
        "live_avatar_client.pipecat needs Pipecat; install it with: pip install 'live-avatar-client[pipecat]'"
    ) from error

from .conversation import AvatarConversation, AvatarOptions
from .errors import ConnectFailed, ConnectionLost, InvalidInput, ServerError, ServerIncompatible, SessionClosed
from .playout import Mark, Tick, mono
from .protocol import FPS, ErrorCode

VIDEO_OUT: Final[dict[str, Any]] = {"video_out_enabled": True, "video_out_is_live": True, "video_out_framerate": FPS}
"""Parameters of the transport: `TransportParams(audio_out_enabled=True, **VIDEO_OUT, video_out_width=...)`.

A transport that is slower than 25 frames a second would let the picture fall behind the sound, without end.
"""

_FRAME_S: Final = 1 / FPS


class LiveAvatarVideoService(AIService):
    """Place it between the TTS and the output of the transport; the transport takes `VIDEO_OUT` among its parameters.

    It takes the TTSAudioRawFrames and pushes, 25 times a second once the transport is ready, an OutputImageRawFrame
    and a SpeechOutputAudioRawFrame of 40 ms, which is silence while nobody speaks. Other frames that come behind
    speech, such as the TTSStoppedFrame and the words that were spoken, stay behind it. If the server fails, an
    ErrorFrame goes upstream, and the speech goes on as TTSAudioRawFrames, without pictures.
    """

    def __init__(self, url: str, *, name: str | None = None, **options: Unpack[AvatarOptions]) -> None:
        """Take the address of the server; the options are those of `live_avatar_client.AsyncAvatarSession`."""
        super().__init__(settings=ServiceSettings(model=None), name=name)
        self._conversation: AvatarConversation | None = AvatarConversation(url, **options)
        """None when the session has not been opened, or is closed: then speech passes as it is."""
        self._rate_hz = 0
        self._failure: Exception | None = None
        self._transport_ready = asyncio.Event()
        self._idle = asyncio.Event()
        self._player: asyncio.Task[None] | None = None
        self._reporter: asyncio.Task[None] | None = None
        self._awaits_first_sound = False

    def can_generate_metrics(self) -> bool:
        """Return True: the time to the first byte is that from the first speech to its first frame."""
        return True

    async def setup(self, setup: FrameProcessorSetup) -> None:  # type: ignore[override]  # as FrameProcessor's own
        """Connect to the server, and wait for the first picture; a failure is reported at the start."""
        await super().setup(setup)
        self._rate_hz = setup.audio_out_sample_rate
        conversation = self._conversation
        if conversation is None:
            return
        conversation.on_error = self._on_error
        try:
            await conversation.open(self._rate_hz)
        except Exception as error:
            self._conversation, self._failure = None, error

    async def start(self, frame: StartFrame) -> None:
        """Begin to play, or report why the server did not open the session."""
        await super().start(frame)
        if self._failure is not None:
            await self._push_failure(self._failure)
        elif self._conversation is not None:
            self._player = self.create_task(self._play(self._conversation))

    async def stop(self, frame: EndFrame) -> None:
        """Let the speech end, and free the session."""
        await super().stop(frame)
        if self._conversation is not None:
            await self._finish(self._conversation)
        await self._close()

    async def cancel(self, frame: CancelFrame) -> None:
        """Free the session at once."""
        await super().cancel(frame)
        await self._close()

    async def cleanup(self) -> None:
        """Free the session, whatever has ended the pipeline."""
        await super().cleanup()  # type: ignore[no-untyped-call]
        await self._close()

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """Take speech, keep what follows it in its place, and pass on everything else."""
        await super().process_frame(frame, direction)
        conversation = self._conversation
        if isinstance(frame, OutputTransportReadyFrame):
            self._transport_ready.set()
        if conversation is None or direction is FrameDirection.UPSTREAM or isinstance(frame, OutputTransportReadyFrame):
            await self.push_frame(frame, direction)
        elif isinstance(frame, TTSAudioRawFrame):
            await self._speak(conversation, frame)
        elif isinstance(frame, InterruptionFrame):
            dropped = conversation.interrupt()
            self._idle.set()
            await self.push_frame(frame, direction)
            await self._push_marked(mark for mark in dropped if not _frame_of(mark).interruptible)
        elif isinstance(frame, StopFrame):
            await self._finish(conversation)
            await self.push_frame(frame, direction)
        else:
            if isinstance(frame, TTSStoppedFrame):
                conversation.finish()
            if isinstance(frame, (DataFrame, ControlFrame)) and conversation.is_speaking:
                conversation.mark(frame)
            else:
                await self.push_frame(frame, direction)

    async def _speak(self, conversation: AvatarConversation, frame: TTSAudioRawFrame) -> None:
        if not conversation.is_speaking:
            self._awaits_first_sound = True
            await self.start_ttfb_metrics()
        conversation.push(mono(frame.audio, frame.num_channels), frame.sample_rate)

    async def _finish(self, conversation: AvatarConversation) -> None:
        """Wait until all speech is played; drop it if the transport has never been ready."""
        conversation.finish()
        if not self._transport_ready.is_set():
            await self._push_marked(conversation.interrupt())
        elif conversation.is_speaking:
            self._idle.clear()
            await self._idle.wait()

    async def _play(self, conversation: AvatarConversation) -> None:
        """Push a frame and its sound every 40 ms.

        A late frame does not let the next ones come sooner, unless it is late by less than a frame: a transport keeps
        sound that it gets too early, and would play it behind its picture from then on.
        """
        await self._transport_ready.wait()
        due_s = time.monotonic()
        with contextlib.suppress(SessionClosed):
            while True:
                item = await conversation.next()
                if isinstance(item, Mark):
                    await self._push_marked([item])
                else:
                    now_s = time.monotonic()
                    due_s = (due_s if now_s - due_s < _FRAME_S else now_s) + _FRAME_S
                    await self._show(item)
                    await asyncio.sleep(due_s - time.monotonic())
                if not conversation.is_speaking:
                    self._idle.set()

    async def _push_marked(self, marks: Iterable[Mark]) -> None:
        for mark in marks:
            await self.push_frame(_frame_of(mark))

    async def _show(self, tick: Tick) -> None:
        sound = np.zeros(self._rate_hz // FPS, np.int16)
        if tick.sound is not None:
            sound[: len(tick.sound)] = tick.sound
        if tick.pixels is None:
            await self.push_frame(TTSAudioRawFrame(sound.tobytes(), self._rate_hz, 1))
            return
        if tick.sound is not None and self._awaits_first_sound:
            self._awaits_first_sound = False
            await self.stop_ttfb_metrics()
        height, width = tick.pixels.shape[:2]
        await self.push_frame(OutputImageRawFrame(tick.pixels.tobytes(), (width, height), "RGB"))
        await self.push_frame(SpeechOutputAudioRawFrame(sound.tobytes(), self._rate_hz, 1))

    def _on_error(self, error: Exception) -> None:
        self._reporter = self.create_task(self._push_failure(error))

    async def _push_failure(self, error: Exception) -> None:
        message = f"the avatar has failed, and the voice goes on without it: {error}"
        await self.push_error(message, exception=error, category=_category(error), force_treat_as_permanent=True)

    async def _close(self) -> None:
        conversation, self._conversation = self._conversation, None
        player, self._player = self._player, None
        if conversation is not None:
            await conversation.close()
        if player is not None:
            await self.cancel_task(player)
        if self._reporter is not None:
            await self.cancel_task(self._reporter)
            self._reporter = None


def _frame_of(mark: Mark) -> Frame:
    return cast(Frame, mark.content)


def _category(error: Exception) -> ErrorCategory:
    if isinstance(error, InvalidInput):
        return ErrorCategory.INVALID_REQUEST
    if isinstance(error, (ConnectFailed, ConnectionLost)):
        return ErrorCategory.CONNECTIVITY
    if isinstance(error, ServerError):
        codes = {
            ErrorCode.INVALID_ARGUMENT: ErrorCategory.INVALID_REQUEST,
            ErrorCode.UNAVAILABLE: ErrorCategory.RATE_LIMIT,
            None: ErrorCategory.AUTHENTICATION,
        }
        return codes.get(error.code, ErrorCategory.SERVER)
    return ErrorCategory.SERVER if isinstance(error, (ServerIncompatible, TimeoutError)) else ErrorCategory.UNKNOWN
