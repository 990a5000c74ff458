"""Encodes a picture and a prompt: what a session's sink and text keys and values are prefilled from."""

from __future__ import annotations

import hashlib

import numpy as np

from live_avatar.arrays import Array
from live_avatar.config import Preset
from live_avatar.errors import InputError
from live_avatar.inputs.image import decode_pixels, normalise
from live_avatar.pipeline.sink import SinkSource
from live_avatar.runtime import Runtime


def avatar_key(image: bytes, prompt: str) -> bytes:
    """Cache key of a picture and a prompt: a hash of their contents, 32 bytes."""
    return hashlib.sha256(hashlib.sha256(image).digest() + prompt.encode(errors="surrogatepass")).digest()


class AvatarEncoder:
    """The encoders of picture and prompt. Keeps no state between calls."""

    def __init__(self, runtime: Runtime) -> None:
        self.preset: Preset = runtime.preset
        self._tokenizer = runtime.tokenizer
        self._graphs = {name: runtime.graph(name) for name in ("vae_encoder", "text_encoder")}

    def encode(self, pixels: Array, prompt: str) -> SinkSource:
        """Latents of `pixels`, uint8 [H, W, 3], and features of `prompt`. Raises `InputError` for another shape or
        type, or a prompt that is too long."""
        self._check(pixels)
        token_ids, token_mask = self._tokenizer.encode(prompt)
        text = self._graphs["text_encoder"].run({"token_ids": token_ids, "token_mask": token_mask})["text"]
        motion = self._graphs["vae_encoder"].run({"picture": normalise(pixels)[None, :, None]})["motion"]
        return SinkSource.of(motion, text)

    def encode_image(self, image: bytes, prompt: str) -> SinkSource:
        """The same for an encoded picture. Raises `InputError` as `decode_pixels` does."""
        return self.encode(decode_pixels(image, self.preset.stream.height, self.preset.stream.width), prompt)

    def _check(self, pixels: Array) -> None:
        expected = (self.preset.stream.height, self.preset.stream.width, 3)
        if pixels.shape != expected or pixels.dtype != np.uint8:
            raise InputError(
                f"the picture is {pixels.dtype} {list(pixels.shape)}; preset {self.preset.name} takes uint8 "
                f"{list(expected)}: scale the picture to that size."
            )
