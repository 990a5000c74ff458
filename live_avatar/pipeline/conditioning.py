"""The front end: picture, prompt, seed and speech become what the denoising steps take.

`Conditioner` holds graphs; the state of a session is a `Conditioning` that it opens and is handed back. Avatars are
remembered by who uses it, under `avatar_key`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from live_avatar.arrays import Array
from live_avatar.config import MOTION_LATENTS, TEMPORAL_STRIDE, Preset
from live_avatar.errors import InputError
from live_avatar.inputs.image import decode_image
from live_avatar.inputs.speech import SpeechWindow, interpolate
from live_avatar.pipeline.sink import SinkSource
from live_avatar.runtime import Runtime

MAX_SEED = 2**63 - 1


def avatar_key(image: bytes, prompt: str) -> bytes:
    """What a picture and prompt are remembered by: a hash of their contents, 32 bytes."""
    return hashlib.sha256(hashlib.sha256(image).digest() + prompt.encode(errors="surrogatepass")).digest()


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
    """Encoders of picture, prompt and speech."""

    def __init__(self, runtime: Runtime) -> None:
        self.preset: Preset = runtime.preset
        self._tokenizer = runtime.tokenizer
        names = ("vae_encoder_first", "vae_encoder", "text_encoder", "speech_encoder", "audio_tokens")
        self._graphs = {name: runtime.graph(name) for name in names}

    def open(self, seed: int) -> Conditioning:
        """State of a new session. Raises `InputError` for a seed outside 0..2^63 - 1."""
        if not 0 <= seed <= MAX_SEED:
            raise InputError(f"seed {seed} is outside 0..{MAX_SEED}; choose one inside.")
        return Conditioning(seed, SpeechWindow(self.preset.stream))

    def avatar(self, image: bytes, prompt: str) -> SinkSource:
        """Latents and text features of a picture and prompt. Raises `InputError` for what cannot be used."""
        stream = self.preset.stream
        frame = decode_image(image, stream.height, stream.width)[None, :, None]
        token_ids, token_mask = self._tokenizer.encode(prompt)
        text = self._graphs["text_encoder"].run({"token_ids": token_ids, "token_mask": token_mask})["text"]
        latents = self._encode_still(frame)
        return SinkSource(latents[:, :, :1], latents, text)

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

    def _encode_still(self, frame: Array) -> Array:
        """[1, 3, 1, H, W] -> the latents [1, 16, 19, h, w] of that frame held for 73 frames.

        The reference is the first of them, as in the reference's five-process loop (spec section 10).
        """
        result = self._graphs["vae_encoder_first"].run({"frames": frame})
        frames = np.repeat(frame, TEMPORAL_STRIDE, axis=2)
        latents = [result["latent"]]
        while len(latents) < MOTION_LATENTS:
            result = self._graphs["vae_encoder"].run({"frames": frames, **next_state(result)})
            latents.append(result["latent"])
        return np.concatenate(latents, axis=2)


def next_state(result: dict[str, Array]) -> dict[str, Array]:
    """The `new_state.*` outputs of a streamed graph as the `state.*` inputs of its next call."""
    return {name.removeprefix("new_"): array for name, array in result.items() if name.startswith("new_state.")}
