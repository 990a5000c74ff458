"""A prompt becomes token ids (spec section 10).

Cleans the text as the released front end does; the text encoder itself is a graph. The byte tokenizer
belongs to the tiny preset and needs no file.
"""

from __future__ import annotations

import html

import ftfy
import numpy as np

from live_avatar.arrays import Array
from live_avatar.config import Preset
from live_avatar.errors import ConfigError, InputError

MAX_CHARS = 2000
BYTE_OFFSET = 3  # ids 0, 1, 2 are padding, end and unknown, as in ByT5
END = 1


def clean_prompt(prompt: str) -> str:
    """Mojibake repaired, HTML unescaped twice, white space collapsed. Raises `InputError` above `MAX_CHARS`."""
    if len(prompt) > MAX_CHARS:
        raise InputError(f"the prompt has {len(prompt)} characters, more than {MAX_CHARS}; shorten it.")
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


def tokenize(prompt: str, preset: Preset) -> tuple[Array, Array]:
    """Ids and mask, int64 [1, text_len] each; a longer prompt is cut, its end token kept."""
    if preset.text.tokenizer != "bytes":
        raise ConfigError(
            f"tokenizer {preset.text.tokenizer!r} of preset {preset.name} is not available; use preset tiny."
        )
    length = preset.dit.text_len
    ids = [*[byte + BYTE_OFFSET for byte in clean_prompt(prompt).encode()][: length - 1], END]
    tokens = np.zeros((2, 1, length), dtype=np.int64)
    tokens[0, 0, : len(ids)] = ids
    tokens[1, 0, : len(ids)] = 1
    return tokens[0], tokens[1]
