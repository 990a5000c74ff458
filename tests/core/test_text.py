"""Prompts: cleaned, cut, counted."""

from __future__ import annotations

import numpy as np
import pytest

from live_avatar.config import S2V_14B, TINY
from live_avatar.errors import ConfigError, InputError
from live_avatar.text import BYTE_OFFSET, END, MAX_CHARS, clean_prompt, tokenize

LENGTH = TINY.dit.text_len


def ids_of(prompt: str) -> list[int]:
    ids, mask = tokenize(prompt, TINY)
    assert ids.shape == mask.shape == (1, LENGTH)
    assert ids.dtype == mask.dtype == np.int64
    count = int(mask.sum())
    assert mask[0].tolist() == [1] * count + [0] * (LENGTH - count)
    assert (ids[0, count:] == 0).all()
    return ids[0, :count].tolist()


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("  a \n\t woman  ", "a woman"),
        ("&amp;amp; &lt;b&gt;", "& <b>"),
        ("cafÃ©", "café"),
        ("a\u00a0b", "a b"),
        ("", ""),
    ],
)
def test_cleaning(prompt: str, cleaned: str) -> None:
    assert clean_prompt(prompt) == cleaned


@pytest.mark.parametrize("prompt", ["hi", "é", "日本", "🙂"])
def test_ids_are_the_utf8_bytes_and_an_end(prompt: str) -> None:
    assert ids_of(prompt) == [*[byte + BYTE_OFFSET for byte in prompt.encode()], END]


def test_an_empty_prompt_is_its_end() -> None:
    assert ids_of("") == ids_of("   ") == [END]


@pytest.mark.parametrize("length", [LENGTH - 2, LENGTH - 1, LENGTH, MAX_CHARS])
def test_a_long_prompt_is_cut_and_keeps_its_end(length: int) -> None:
    letters = min(length, LENGTH - 1)
    assert ids_of("x" * length) == [ord("x") + BYTE_OFFSET] * letters + [END]


def test_every_id_is_in_the_vocabulary() -> None:
    assert TINY.text.vocab_size > 255 + BYTE_OFFSET


def test_a_half_character_is_no_crash() -> None:
    assert ids_of("a \ud800")[-1] == END


def test_a_prompt_of_a_hundred_thousand_characters_is_refused() -> None:
    with pytest.raises(InputError, match=r"the prompt has 100000 characters, more than 2000; shorten it\."):
        tokenize("x" * 100_000, TINY)


def test_a_tokenizer_that_is_not_there_is_named() -> None:
    message = r"tokenizer 'umt5' of preset s2v-14b is not available; use preset tiny\."
    with pytest.raises(ConfigError, match=message):
        tokenize("hi", S2V_14B)
