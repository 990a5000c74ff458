"""Turns seed and speech into the noise and the audio tokens of each block.

`Conditioner` holds graphs; the state of a session is a `Conditioning` that it opens and is handed back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from live_avatar.arrays import Array
from live_avatar.config import Preset
from live_avatar.errors import InputError
from live_avatar.inputs.speech import SpeechWindow, interpolate
from live_avatar.runtime import Runtime

MAX_SEED = 2**63 - 1


def block_noise(seed: int, block: int, shape: tuple[int, ...]) -> Array:
    """Unit Gaussian noise of one block, float32: a pure function of seed and block (counted from 0)."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, block])).standard_normal(shape, np.float32)


@dataclass(frozen=True)
class BlockInput:
    """What one block is made from, the caches aside.

    index counts from 0; first_frame is the block's first video frame on the speech's clock; noise
    [1, 16, F, h, w]; audio: the outputs of `audio_tokens` by name.
    """

    index: int
    first_frame: int
    noise: Array
    audio: dict[str, Array]


@dataclass
class Conditioning:
    """The conditioning state of one session."""

    seed: int
    speech: SpeechWindow
    blocks: int = 0


class Conditioner:
    """The encoders of speech."""

    def __init__(self, runtime: Runtime) -> None:
        self.preset: Preset = runtime.preset
        self._graphs = {name: runtime.graph(name) for name in ("speech_encoder", "audio_tokens")}

    def open(self, seed: int) -> Conditioning:
        """State of a new session. Raises `InputError` for a seed outside 0..2^63 - 1."""
        if not 0 <= seed <= MAX_SEED:
            raise InputError(f"seed {seed} is outside 0..{MAX_SEED}; choose one inside.")
        return Conditioning(seed, SpeechWindow(self.preset.stream))

    def block(self, state: Conditioning, samples: Array) -> BlockInput:
        """The next block of the session, from its int16 [block_samples] of speech."""
        window = state.speech.push(samples)
        hidden = self._graphs["speech_encoder"].run({"samples": window})["hidden"]
        features = interpolate(hidden, state.speech.positions(hidden.shape[1]))
        audio = self._graphs["audio_tokens"].run({"states": np.ascontiguousarray(features.transpose(0, 2, 1))})
        noise = block_noise(state.seed, state.blocks, (1, *self.preset.stream.latent_shape))
        made = BlockInput(state.blocks, state.speech.first_frame, noise, audio)
        state.blocks += 1
        return made
