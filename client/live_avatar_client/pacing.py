"""Tells when an avatar that nobody makes speak needs silence, so that it keeps moving."""

import math
from dataclasses import dataclass
from typing import Final

from .protocol import BLOCK_SAMPLES, SAMPLE_RATE_HZ

BLOCK_S: Final = BLOCK_SAMPLES / SAMPLE_RATE_HZ

SPEECH_GAP_S: Final = BLOCK_S / 2
"""Chunks that follow each other faster than this are one speech, into which no silence goes."""

_CATCH_UP_S: Final = BLOCK_S / 2


@dataclass
class PlaybackClock:
    """When a player that shows everything at its own pace has shown all that was sent."""

    due_at_s: float
    """When it needs the next block."""
    _spoken_at_s: float = -math.inf

    def silence_at_s(self) -> float:
        """Return when silence is to be sent, unless speech comes before."""
        return max(self.due_at_s, self._spoken_at_s + SPEECH_GAP_S)

    def speech_given(self, now_s: float) -> None:
        """Take note that the application gave a chunk of speech."""
        self._spoken_at_s = now_s

    def block_sent(self, now_s: float) -> None:
        """Take note that a block was sent.

        A block that comes a little late, as after every timer, does not move the clock: an hour of silence
        would fall behind otherwise. After a pause the clock starts anew.
        """
        begin_s = self.due_at_s if now_s - self.due_at_s < _CATCH_UP_S else now_s
        self.due_at_s = begin_s + BLOCK_S

    def restart(self, now_s: float) -> None:
        """Take note that nothing of what was sent is played any more."""
        self.due_at_s = now_s

    def interrupted(self, now_s: float) -> None:
        """Take note that nothing of what was sent is played, and that new speech may be about to come."""
        self.restart(now_s)
        self.speech_given(now_s)
