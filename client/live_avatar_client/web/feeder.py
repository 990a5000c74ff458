"""Hands speech to a session at the pace of playback, a little ahead of it.

Speech that comes in a burst, as from a text, would otherwise fill the pipe of the server, and a barge-in would have to
wait until all of it is through.
"""

import asyncio
import time
from collections import deque
from typing import Final

from ..aio import AsyncAvatarSession
from ..cutter import Samples
from ..errors import InvalidInput
from ..protocol import BLOCK_SAMPLES, SAMPLE_RATE_HZ
from .protocol import MAX_SPEECH_S

LEAD_S: Final = 2 * BLOCK_SAMPLES / SAMPLE_RATE_HZ
_PIECE: Final = BLOCK_SAMPLES // 4
_MOST_SAMPLES: Final = round(MAX_SPEECH_S * SAMPLE_RATE_HZ)


class SpeechFeeder:
    """A queue of speech before a session."""

    def __init__(self, session: AsyncAvatarSession) -> None:
        self._session = session
        self._pieces: deque[Samples] = deque()
        self._samples = 0
        self._spoken_at_s = 0.0
        """When everything that was sent has been spoken."""
        self._changed = asyncio.Event()

    @property
    def waiting_s(self) -> float:
        """How much speech waits, in seconds."""
        return self._samples / SAMPLE_RATE_HZ

    def add(self, samples: Samples) -> None:
        """Append speech; raise InvalidInput, and take nothing, if too much waits already."""
        if self._samples + len(samples) > _MOST_SAMPLES:
            raise InvalidInput(
                f"{self.waiting_s:.0f} s of speech wait, and {len(samples) / SAMPLE_RATE_HZ:.0f} s more came; send "
                f"speech as it is spoken, at most {MAX_SPEECH_S:g} s ahead"
            )
        self._append(samples)

    async def add_when_room(self, samples: Samples) -> None:
        """Append speech, as soon as less than half of what may wait does."""
        while self._samples > _MOST_SAMPLES // 2:
            self._changed.clear()
            await self._changed.wait()
        self._append(samples)

    def drop(self) -> None:
        """Forget the speech that waits; the next may be sent at once."""
        self._pieces.clear()
        self._samples = 0
        self._spoken_at_s = 0.0
        self._changed.set()

    async def run(self) -> None:
        """Send what waits, for ever."""
        while True:
            while not self._pieces or (early_s := self._early_s()) > 0:
                self._changed.clear()
                await self._wait(early_s if self._pieces else None)
            piece = self._pieces.popleft()
            self._samples -= len(piece)
            self._spoken_at_s = max(self._spoken_at_s, time.monotonic()) + len(piece) / SAMPLE_RATE_HZ
            self._changed.set()
            await self._session.send(piece)

    def _append(self, samples: Samples) -> None:
        self._pieces.extend(samples[start : start + _PIECE] for start in range(0, len(samples), _PIECE))
        self._samples += len(samples)
        self._changed.set()

    def _early_s(self) -> float:
        return self._spoken_at_s - time.monotonic() - LEAD_S

    async def _wait(self, limit_s: float | None) -> None:
        try:
            async with asyncio.timeout(limit_s):
                await self._changed.wait()
        except TimeoutError:
            pass
