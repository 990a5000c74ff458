"""One conversation of a voice agent: a session whose avatar speaks segments, can be interrupted, and moves in between.

The adapters `livekit` and `pipecat` are built on it.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final, Required, TypedDict, Unpack

from .aio import AsyncAvatarSession
from .cutter import Samples
from .errors import SessionBusy, SessionClosed
from .playout import Mark, Playout, Tick
from .protocol import FRAMES_PER_LATENT
from .tls import TLS

_LOOK_AGAIN_S: Final = 0.05
"""How often the feeder looks at the clock: whether speech has paused, and whether the look-ahead is known."""


class AvatarOptions(TypedDict, total=False):
    """The options of `AsyncAvatarSession` that an agent chooses."""

    image: Required[bytes | str | os.PathLike[str]]
    prompt: str
    seed: int
    label: str
    api_key: str | None
    tls: TLS | None
    connect_timeout_s: float
    answer_timeout_s: float


class AvatarConversation:
    """An avatar that speaks what is pushed and keeps moving when nothing is; `next` gives picture and sound.

    Only so much is asked of the server as the player needs next. So an interruption has little to wait for, and a
    player that stands still has no old pictures to catch up with. If the session fails, `on_error` is called once, and
    the speech goes on without pictures.
    """

    def __init__(self, url: str, **options: Unpack[AvatarOptions]) -> None:
        """Check the server's address and the options (see `AsyncAvatarSession`; `image` is required)."""
        self._playout: Playout | None = None
        self._session = AsyncAvatarSession(url, frames_per_response=FRAMES_PER_LATENT, **options)
        self.error: Exception | None = None
        """Why the session has failed."""
        self.on_error: Callable[[Exception], None] | None = None
        self.frame_size: tuple[int, int] | None = None
        """Width and height of the pictures, known when `open` returns."""
        self._playable = asyncio.Event()
        self._wanted = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False

    async def open(self, sound_rate_hz: int) -> None:
        """Connect, and wait for the first picture; raises the client's errors.

        `sound_rate_hz` is the rate of the sound that is played, a multiple of 25.
        """
        playout = Playout(sound_rate_hz)
        await self._session.__aenter__()
        self._playout = playout
        self._start(self._read(playout), "reader")
        self._start(self._feed(playout), "feeder")
        try:
            while self.frame_size is None:
                if self.error is not None:
                    raise self.error
                await self._wait(self._playable)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Free the session, and end the tasks; a waiting `next` raises SessionClosed."""
        self._closed = True
        self._playable.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._session.close()

    @property
    def is_speaking(self) -> bool:
        """Whether speech or marks wait to be played."""
        return self._playout is not None and self._playout.is_speaking

    def push(self, pcm: Samples, rate_hz: int) -> None:
        """Add speech, int16 [n], mono; it is kept until it is played."""
        self._opened().push(pcm, rate_hz, time.monotonic())
        self._changed()

    def finish(self) -> None:
        """End the run of speech, so that its last frames come without waiting for more of it."""
        self._opened().finish()
        self._changed()

    def mark(self, content: object) -> None:
        """Have `next` return `Mark(content)` after the speech that was pushed so far."""
        self._opened().mark(content)
        self._changed()

    def interrupt(self) -> list[Mark]:
        """Drop all speech that was not played; return the marks that were dropped with it."""
        dropped = self._opened().interrupt()
        self._changed()
        return dropped

    async def next(self) -> Tick | Mark:
        """Wait for the next frame, with its sound, or the next mark; the caller sets the pace."""
        while (item := self._opened().next_item()) is None or self._closed:
            if self._closed:
                raise SessionClosed("the conversation is closed; open a new one")
            await self._wait(self._playable)
        self._wanted.set()
        return item

    def _opened(self) -> Playout:
        """The state; what is said after the end changes it, and is heard by nobody."""
        if self._playout is None:
            raise SessionClosed("the conversation is not open yet; await its start first")
        return self._playout

    def _changed(self) -> None:
        self._wanted.set()
        self._playable.set()

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        self._tasks.append(asyncio.create_task(work, name=f"live-avatar-conversation-{name}"))

    async def _read(self, playout: Playout) -> None:
        try:
            async for block in self._session:
                playout.receive(block)
                height, width = block.frames.shape[1:3]
                self.frame_size = width, height
                self._changed()
        except Exception as error:
            self._fail(error)

    async def _feed(self, playout: Playout) -> None:
        """Send blocks as the player needs them."""
        while True:
            try:
                await self._send_wanted(playout)
            except Exception as error:
                self._fail(error)
            await self._wait(self._wanted, _LOOK_AGAIN_S)

    async def _send_wanted(self, playout: Playout) -> None:
        playout.lookahead_frames = self._session.lookahead_frames or 0
        while block := playout.next_block(time.monotonic()):
            try:
                # Without waiting: what was sent is known at once, also if an interruption comes.
                await self._session.send(block.speech, wait=False)
            except SessionBusy:
                return
            playout.sent(block)
        self._playable.set()

    def _fail(self, error: Exception) -> None:
        if self.error is not None or self._closed:
            return
        self.error = error
        self._opened().fail()
        self._changed()
        if self.on_error is not None and self.frame_size is not None:  # before that, `open` raises it
            self.on_error(error)

    async def _wait(self, event: asyncio.Event, timeout_s: float | None = None) -> None:
        event.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await event.wait()
