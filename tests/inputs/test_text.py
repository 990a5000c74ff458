"""Prompts: cleaned, cut, counted."""

from __future__ import annotations

import html
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import ftfy
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.synthetic import PIECES, make_tokenizer_file, official_preset
from live_avatar.config import S2V_14B, TINY
from live_avatar.errors import ArtifactError, InputError
from live_avatar.inputs.text import (
    BYTE_OFFSET,
    END,
    MAX_CHARS,
    ByteTokenizer,
    Tokenizer,
    Umt5Tokenizer,
    clean_prompt,
    make_tokenizer,
)

LENGTH = TINY.dit.text_len
BYTES = make_tokenizer(TINY, None)
OFFICIAL = official_preset(TINY, {})


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the official kind, whose pieces are single letters and bytes."""
    path = tmp_path_factory.mktemp("umt5") / "tokenizer.json"
    make_tokenizer_file(path)
    return path


@pytest.fixture(scope="module")
def umt5(tokenizer_file: Path) -> Tokenizer:
    return make_tokenizer(OFFICIAL, tokenizer_file)


def ids_of(prompt: str, tokenizer: Tokenizer = BYTES) -> list[int]:
    ids, mask = tokenizer.encode(prompt)
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


def released_cleaning(text: str) -> str:
    """The released front end's order of steps: repair, unescape twice, strip; then runs of \\s become one space."""
    repaired = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", repaired).strip()


@given(st.text(max_size=60) | st.text("&amp;lt#x20;3<> \t\x1c\u00a0\u3000Ãâ€™é", max_size=60))
def test_cleaning_is_the_released_one(prompt: str) -> None:
    assert clean_prompt(prompt) == released_cleaning(prompt)


def test_the_same_characters_are_white_space() -> None:
    for character in map(chr, range(sys.maxunicode + 1)):
        assert bool(re.fullmatch(r"\s", character)) == (not character.split()), hex(ord(character))


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


def test_a_prompt_of_a_hundred_thousand_characters_is_refused(umt5: Tokenizer) -> None:
    for tokenizer in (BYTES, umt5):
        with pytest.raises(InputError, match=r"the prompt has 100000 characters, more than 2000; shorten it\."):
            tokenizer.encode("x" * 100_000)


def test_each_preset_has_its_kind_of_tokenizer(tokenizer_file: Path) -> None:
    assert isinstance(make_tokenizer(TINY, None), ByteTokenizer)
    assert isinstance(make_tokenizer(S2V_14B, tokenizer_file), Umt5Tokenizer)


def test_umt5_ids_are_the_pieces_of_the_cleaned_prompt_and_an_end(umt5: Tokenizer) -> None:
    pieces = ["\u2581", "h", "i", "\u2581", "&", "<0xE6>", "<0x97>", "<0xA5>", "</s>"]
    assert ids_of(" hi \n &amp;amp;日 ", umt5) == [PIECES.index(piece) for piece in pieces]
    assert ids_of("", umt5) == ids_of(" \t", umt5) == [PIECES.index("</s>")]


@pytest.mark.parametrize("letters", [LENGTH - 3, LENGTH - 2, LENGTH - 1, LENGTH, MAX_CHARS])
def test_a_long_umt5_prompt_is_cut_and_keeps_its_end(umt5: Tokenizer, letters: int) -> None:
    kept = min(letters, LENGTH - 2)  # a mark of the word's begin goes before them
    assert ids_of("x" * letters, umt5) == [PIECES.index("\u2581"), *[PIECES.index("x")] * kept, PIECES.index("</s>")]


@pytest.mark.parametrize("prompt", ["", "A woman speaks to the camera.", "日本 🙂", "</s> <pad> a", "z " * 500])
def test_umt5_encodes_as_transformers_does(umt5: Tokenizer, tokenizer_file: Path, prompt: str) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), pad_token="<pad>", eos_token="</s>")
    expected = theirs([clean_prompt(prompt)], padding="max_length", truncation=True, max_length=LENGTH)
    ids, mask = umt5.encode(prompt)
    assert ids.tolist() == expected["input_ids"]
    assert mask.tolist() == expected["attention_mask"]


def test_a_half_character_is_no_crash_for_umt5(umt5: Tokenizer) -> None:
    assert ids_of("a \ud800", umt5)[-1] == PIECES.index("</s>")


def test_a_preset_without_its_tokenizer_file_is_named() -> None:
    message = r"preset s2v-14b needs a tokenizer file and none was given; expected the tokenizer\.json of google/umt5"
    with pytest.raises(ArtifactError, match=message):
        make_tokenizer(S2V_14B, None)


def test_a_missing_tokenizer_file_is_named(tmp_path: Path) -> None:
    message = r"tokenizer file .*nowhere\.json does not exist; expected the tokenizer\.json of google/umt5-xxl there\."
    with pytest.raises(ArtifactError, match=message):
        make_tokenizer(S2V_14B, tmp_path / "nowhere.json")


@pytest.mark.parametrize("kept", [0, 1, 5000])
def test_half_a_tokenizer_file_is_named(tokenizer_file: Path, tmp_path: Path, kept: int) -> None:
    half = tmp_path / "tokenizer.json"
    half.write_bytes(tokenizer_file.read_bytes()[:kept])
    with pytest.raises(ArtifactError, match=r"is not a whole tokenizer\.json \(.*\); fetch it again\."):
        make_tokenizer(OFFICIAL, half)


def test_a_tokenizer_larger_than_the_text_encoder_is_named(tokenizer_file: Path) -> None:
    small = replace(OFFICIAL, text=replace(OFFICIAL.text, vocab_size=100))
    with pytest.raises(ArtifactError, match=rf"has {len(PIECES)} tokens, more than the 100 of the text encoder; fetch"):
        make_tokenizer(small, tokenizer_file)


def test_a_tokenizer_that_adds_no_end_is_named(tokenizer_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "tokenizer.json"
    other.write_text(json.dumps(json.loads(tokenizer_file.read_text()) | {"post_processor": None}))
    with pytest.raises(ArtifactError, match=r"encodes nothing as \[\], expected the id of </s>; fetch the tokenizer"):
        make_tokenizer(OFFICIAL, other)
