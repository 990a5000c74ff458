"""Turns seed and speech into the noise and the audio tokens of each block.

`Conditioner` holds graphs, and the tokens of silence; the state of a session is a `Conditioning` that it opens and is
handed back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from live_avatar.arrays import Array
from live_avatar.config import Preset
from live_avatar.errors import InputError
from live_avatar.inputs.speech import SpeechWindow, columns_and_parts, interpolate
from live_avatar.pipeline.lru import LRU
from live_avatar.runtime import Runtime

MAX_SEED = 2**63 - 1
SILENCES = 64
"""Silent windows whose tokens are remembered. They differ in length, and in where the frames lie between features."""


def block_noise(seed: int, block: int, shape: tuple[int, ...]) -> Array:
    """Unit Gaussian noise of one block, float32: a pure function of seed and block (counted from 0)."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, block])).standard_normal(shape, np.float32)


@dataclass(frozen=True)
class BlockInput:
    """What one block is made from, the caches aside.

    index counts from 0; first_frame is the block's first video frame on the speech's clock; noise
    [1, 16, F, h, w]; audio: the inputs of `dit` that begin with `audio_`, by name.
    """

    index: int
    first_frame: int
    noise: Array
    audio: dict[str, Array]


@dataclass
class Conditioning:
    """The conditioning state of one session. speech: a window for each speaker. weight: float32 [speakers, F, S]."""

    seed: int
    speech: list[SpeechWindow]
    weight: Array
    blocks: int = 0


class Conditioner:
    """The encoders of speech."""

    def __init__(self, runtime: Runtime) -> None:
        self.preset: Preset = runtime.preset
        self._graphs = {name: runtime.graph(name) for name in ("speech_encoder", "audio_tokens")}
        self._silences: LRU[dict[str, Array]] = LRU(SILENCES)

    def open(self, seed: int, weights: Array | None = None) -> Conditioning:
        """State of a new session. weights: float32 [speakers, S], how much the speech of each speaker moves each token
        of a frame; one speaker alone moves all of them without. Raises `InputError` for a seed outside 0..2^63 - 1, and
        for weights of another shape."""
        if not 0 <= seed <= MAX_SEED:
            raise InputError(f"seed {seed} is outside 0..{MAX_SEED}; choose one inside.")
        stream = self.preset.stream
        expected = (stream.speakers, stream.frame_tokens)
        if weights is None and stream.speakers == 1:
            weights = np.ones(expected, dtype=np.float32)
        if weights is None or weights.shape != expected:
            shown = "missing" if weights is None else str(list(weights.shape))
            raise InputError(
                f"the weights of the speakers are {shown}; expected {list(expected)}, made of their masks."
            )
        windows = [SpeechWindow(stream) for _ in range(stream.speakers)]
        return Conditioning(seed, windows, np.repeat(weights[:, None], stream.frames_per_block, axis=1))

    def block(self, state: Conditioning, samples: Array) -> BlockInput:
        """The next block of the session, from its int16 [block_samples] of speech, or [speakers, block_samples] of
        several. Raises `InputError` for another shape or type."""
        spoken = [samples] if len(state.speech) == 1 else self._of_speakers(samples)
        made = [self._tokens(speech, said) for speech, said in zip(state.speech, spoken, strict=True)]
        audio = {name: np.stack([tokens[name] for tokens in made]) for name in made[0]}
        noise = block_noise(state.seed, state.blocks, (1, *self.preset.stream.latent_shape))
        first_frame = state.speech[0].first_frame
        block = BlockInput(state.blocks, first_frame, noise, {**audio, "audio_weight": state.weight})
        state.blocks += 1
        return block

    def _of_speakers(self, samples: Array) -> list[Array]:
        """The speech of each. Raises `InputError` before any speaker has heard a part of the block."""
        stream = self.preset.stream
        if samples.dtype != np.int16 or samples.shape != (stream.speakers, stream.block_samples):
            raise InputError(
                f"a block of speech is {samples.dtype} {list(samples.shape)}; expected int16 "
                f"[{stream.speakers}, {stream.block_samples}], 16 kHz mono of each speaker, with zeros for silence."
            )
        return list(samples)

    def _tokens(self, speech: SpeechWindow, samples: Array) -> dict[str, Array]:
        """Outputs of `audio_tokens` for one speaker's next block. Those of silence are made once: nothing is encoded
        for a speaker who is silent."""
        window = speech.push(samples)
        positions = speech.positions(self.preset.speech.feature_count(window.shape[1]))
        if window.any():
            return self._encoded(window, positions)
        low, part = columns_and_parts(positions)
        key = window.shape[1].to_bytes(8, "little") + low.tobytes() + part.tobytes()
        return self._silences.get(key, lambda: _copied(self._encoded(window, positions)))

    def _encoded(self, window: Array, positions: Array) -> dict[str, Array]:
        hidden = self._graphs["speech_encoder"].run({"samples": window})["hidden"]
        features = interpolate(hidden, positions)
        return self._graphs["audio_tokens"].run({"states": np.ascontiguousarray(features.transpose(0, 2, 1))})


def _copied(tokens: dict[str, Array]) -> dict[str, Array]:
    """In memory of their own: the next run may overwrite the graph's."""
    return {name: array.copy() for name, array in tokens.items()}
