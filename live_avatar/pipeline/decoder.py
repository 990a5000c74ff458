"""Clean latents become video frames, as a stream.

`FrameDecoder` holds the decoder's graphs; a session's `DecoderState` holds the history of its causal convolutions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from live_avatar.arrays import Array
from live_avatar.pipeline.avatar import next_state
from live_avatar.runtime import Runtime


@dataclass
class DecoderState:
    """Slots of the streaming decoder, `state.0` ... by name; replaced by every block, never written."""

    slots: dict[str, Array]


class FrameDecoder:
    """The streaming half of the VAE."""

    def __init__(self, runtime: Runtime) -> None:
        self._stream = runtime.preset.stream
        self._first = runtime.graph("vae_decoder_first")
        self._next = runtime.graph("vae_decoder")

    def warm_up(self, motion: Array) -> dict[str, Array]:
        """Slots of a stream whose past is the still picture: its motion latents [1, 16, 19, h, w].

        The warm-up frames are thrown away, and all frames of block 1 are kept: the released code drops three
        of them, which puts its video 0.12 s ahead of the sound (quirk Q14).
        """
        step = self._stream.frames_per_block
        state = DecoderState(next_state(self._first.run({"latents": np.ascontiguousarray(motion[:, :, :1])})))
        for start in range(1, self._stream.decoder_warmup_latents, step):
            self.decode(state, np.ascontiguousarray(motion[:, :, start : start + step]))
        return state.slots

    def decode(self, state: DecoderState, latents: Array) -> Array:
        """Latents [1, 16, F, h, w] of the stream's next block -> frames uint8 [4F, H, W, 3]."""
        result = self._next.run({"latents": latents, **state.slots})
        state.slots = next_state(result)
        return result["frames"]
