"""The attention sink of a session: where it comes from, and when it is replaced (spec sections 6, 9).

Rolling sink frame mechanism: the sink is the reference image at first; from `sink_update_block` on it is the first
clean latent frame of block 1 (adaptive attention sink); its position rolls with the stream (`rope.sink_position`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from live_avatar.arrays import Array
from live_avatar.config import StreamConfig


@dataclass(frozen=True)
class SinkSource:
    """What the sink and the text keys and values are prefilled from.

    reference [1, 16, 1, h, w], motion [1, 16, 19, h, w], text [text_len, text_dim], all float32.
    """

    reference: Array
    motion: Array
    text: Array

    @classmethod
    def of(cls, motion: Array, text: Array) -> Self:
        """That of an avatar. The reference is the first latent frame, as in the reference's five-process loop (spec
        section 10)."""
        return cls(first_latent_frame(motion), motion, text)

    def replaced(self, first_clean: Array) -> SinkSource:
        """The same with the model's own frame [1, 16, 1, h, w] as reference; motion and text stay."""
        return SinkSource(first_clean, self.motion, self.text)

    def copied(self) -> SinkSource:
        """The same in memory of its own, to be kept beyond a request."""
        return SinkSource(self.reference.copy(), self.motion.copy(), self.text.copy())


def gives_sink(block: int, stream: StreamConfig) -> bool:
    """Whether the clean latents of this block (counted from 0) hold the replacement of the sink."""
    return block == 0 and stream.sink_update_block is not None


def takes_sink(block: int, stream: StreamConfig) -> bool:
    """Whether the replaced sink takes effect at this block (counted from 0)."""
    return stream.sink_update_block is not None and block == stream.sink_update_block - 1


def first_latent_frame(latents: Array) -> Array:
    """[1, 16, F, h, w] -> [1, 16, 1, h, w]."""
    return latents[:, :, :1].copy()
