"""Decides when to send silence, so that an idle avatar keeps moving."""

import math
from dataclasses import dataclass
from typing import Final

from .protocol import BLOCK_SAMPLES, SAMPLE_RATE_HZ

BLOCK_S: Final = BLOCK_SAMPLES / SAMPLE_RATE_HZ

SPEECH_GAP_S: Final = BLOCK_S / 2
"""Chunks with shorter gaps are one speech; no silence is sent between them."""

_CATCH_UP_S: Final = BLOCK_S / 2


@dataclass
class PlaybackClock:
    """Time at which a real-time player has shown everything that was sent."""

    due_at_s: float
    """When the player needs the next block."""
    _spoken_at_s: float = -math.inf

    def silence_at_s(self) -> float:
        """Return when silence is due, unless speech comes earlier."""
        return max(self.due_at_s, self._spoken_at_s + SPEECH_GAP_S)

    def speech_given(self, now_s: float) -> None:
        """Record that the application gave a chunk of speech."""
        self._spoken_at_s = now_s

    def block_sent(self, now_s: float) -> None:
        """Record that a block was sent.

        A block that is a little late, as after every timer, does not move the clock; otherwise an hour of silence
        would fall behind. After a pause the clock starts again.
        """
        begin_s = self.due_at_s if now_s - self.due_at_s < _CATCH_UP_S else now_s
        self.due_at_s = begin_s + BLOCK_S

    def restart(self, now_s: float) -> None:
        """Restart the clock: what was sent is no longer played."""
        self.due_at_s = now_s

    def interrupted(self, now_s: float) -> None:
        """Restart the clock at an interrupt; new speech may follow at once."""
        self.restart(now_s)
        self.speech_given(now_s)
