"""Clean latents become video frames, as a stream.

`FrameDecoder` holds the decoder's graphs; a session's `DecoderState` holds the history of its causal convolutions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from live_avatar.arrays import Array
from live_avatar.runtime import Runtime


@dataclass
class DecoderState:
    """Slots of the streaming decoder, `state.0` ... by name; replaced by every latent, never written."""

    slots: dict[str, Array]


class FrameDecoder:
    """The streaming half of the VAE."""

    def __init__(self, runtime: Runtime) -> None:
        self._stream = runtime.preset.stream
        self._warm_up = runtime.graph("vae_decoder_warm_up")
        self._next = runtime.graph("vae_decoder")

    def warm_up(self, motion: Array) -> dict[str, Array]:
        """Slots of a stream whose past is the still picture: its motion latents [1, 16, 19, h, w].

        The frames of the warm-up are not made, and all frames of block 1 are kept: the released code drops three
        of them, which puts its video 0.12 s ahead of the sound (quirk Q14).
        """
        latents = np.ascontiguousarray(motion[:, :, : self._stream.decoder_warmup_latents])
        return _next_state(self._warm_up.run({"latents": latents}))

    def decode(self, state: DecoderState, latents: Array) -> Array:
        """The stream's next latents [1, 16, F, h, w] -> frames uint8 [4F, H, W, 3]."""
        count = latents.shape[2]
        if count == 1:
            return self._decode_one(state, latents)
        return np.concatenate([self._decode_one(state, latents[:, :, i : i + 1]) for i in range(count)])

    def _decode_one(self, state: DecoderState, latent: Array) -> Array:
        result = self._next.run({"latents": np.ascontiguousarray(latent), **state.slots})
        state.slots = _next_state(result)
        return result["frames"]


def _next_state(result: dict[str, Array]) -> dict[str, Array]:
    """The `new_state.*` outputs of a streamed graph as the `state.*` inputs of its next call."""
    return {name.removeprefix("new_"): array for name, array in result.items() if name.startswith("new_state.")}
