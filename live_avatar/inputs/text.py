"""A prompt becomes token ids (spec section 10).

Cleans the text as the released front end does; the text encoder itself is a graph. The official tokenizer is read from
its `tokenizer.json`; the byte tokenizer belongs to the tiny preset and needs no file.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import ftfy
import numpy as np
import tokenizers

from live_avatar.arrays import Array
from live_avatar.config import Preset
from live_avatar.errors import ArtifactError, InputError

MAX_CHARS = 2000
BYTE_OFFSET = 3  # ids 0, 1, 2 are padding, end and unknown, as in ByT5
END = 1
END_TOKEN = "</s>"


class Tokenizer(Protocol):
    """What makes a text encoder's input of a prompt."""

    def encode(self, prompt: str) -> tuple[Array, Array]:
        """Ids and mask, int64 [1, text_len] each, zero behind the end token, which a longer prompt keeps as well."""
        ...


class ByteTokenizer:
    """Ids are UTF-8 bytes."""

    def __init__(self, text_len: int) -> None:
        self._text_len = text_len

    def encode(self, prompt: str) -> tuple[Array, Array]:
        """See `Tokenizer`. Raises `InputError` for a prompt above `MAX_CHARS`."""
        letters = [byte + BYTE_OFFSET for byte in clean_prompt(prompt).encode()]
        return _padded([*letters[: self._text_len - 1], END], self._text_len)


class Umt5Tokenizer:
    """The tokenizer of UMT5, or any that appends `</s>`, from its `tokenizer.json`.

    Raises `ArtifactError` for a file that is missing, damaged, of another kind, or has more than `vocab_size` tokens.
    """

    def __init__(self, file: Path, text_len: int, vocab_size: int) -> None:
        self._text_len = text_len
        if not file.is_file():
            raise ArtifactError(
                f"tokenizer file {file} does not exist; expected the tokenizer.json of google/umt5-xxl there."
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # what the library raises is Exception itself
            raise ArtifactError(f"{file} is not a whole tokenizer.json ({error}); fetch it again.") from error
        size = self._tokenizer.get_vocab_size()
        if size > vocab_size:
            raise ArtifactError(
                f"{file} has {size} tokens, more than the {vocab_size} of the text encoder; fetch the tokenizer that "
                "belongs to it."
            )
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(text_len)
        ended = self._tokenizer.encode("").ids
        if ended != [self._tokenizer.token_to_id(END_TOKEN)]:
            raise ArtifactError(
                f"{file} encodes nothing as {ended}, expected the id of {END_TOKEN}; fetch the tokenizer.json of "
                "google/umt5-xxl."
            )

    def encode(self, prompt: str) -> tuple[Array, Array]:
        """See `Tokenizer`. Raises `InputError` for a prompt above `MAX_CHARS`."""
        return _padded(self._tokenizer.encode(clean_prompt(prompt)).ids, self._text_len)


def make_tokenizer(preset: Preset, tokenizer_file: Path | None) -> Tokenizer:
    """The tokenizer that the preset names. Raises `ArtifactError` if it needs a file that is missing or damaged."""
    if preset.text.tokenizer == "bytes":
        return ByteTokenizer(preset.dit.text_len)
    if tokenizer_file is None:
        raise ArtifactError(
            f"preset {preset.name} needs a tokenizer file and none was given; expected the tokenizer.json of "
            "google/umt5-xxl."
        )
    return Umt5Tokenizer(tokenizer_file, preset.dit.text_len, preset.text.vocab_size)


def clean_prompt(prompt: str) -> str:
    """Mojibake repaired, HTML unescaped twice, white space collapsed. Raises `InputError` above `MAX_CHARS`."""
    if len(prompt) > MAX_CHARS:
        raise InputError(f"the prompt has {len(prompt)} characters, more than {MAX_CHARS}; shorten it.")
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


def _padded(ids: Sequence[int], length: int) -> tuple[Array, Array]:
    tokens = np.zeros((2, 1, length), dtype=np.int64)
    tokens[0, 0, : len(ids)] = ids
    tokens[1, 0, : len(ids)] = 1
    return tokens[0], tokens[1]
