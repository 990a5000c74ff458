"""The input data is what a client would send: the same blocks, and the picture with the first alone."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from live_avatar.arrays import Array
from live_avatar.assets import DEMO_PROMPT, PORTRAIT, SPEECH
from live_avatar.errors import InputError
from live_avatar_client.media import read_speech
from live_avatar_client.protocol import AUDIO, BLOCK_SAMPLES, INPUTS, PROMPT, REFERENCE_IMAGE
from perf.input_data import blocks_of, main, write_input_data


def written(path: Path, *options: str) -> list[dict[str, dict[str, object]]]:
    result = CliRunner().invoke(main, [str(path), *options])
    assert result.exit_code == 0, result.output
    (steps,) = json.loads(path.read_text())["data"]
    return list(steps)


def content(tensor: dict[str, object]) -> bytes:
    coded = tensor["content"]
    assert isinstance(coded, dict)
    return base64.b64decode(coded["b64"])


def test_the_demo_is_cut_as_the_client_cuts_it(tmp_path: Path) -> None:
    steps = written(tmp_path / "input.json")
    said = np.frombuffer(b"".join(content(step[AUDIO.name]) for step in steps), np.int16)
    speech = read_speech(SPEECH)
    assert np.array_equal(said[: speech.size], speech)
    assert said.size % BLOCK_SAMPLES == 0
    assert not said[speech.size :].any()


def test_picture_and_prompt_come_with_the_first_block_alone(tmp_path: Path) -> None:
    first, *rest = written(tmp_path / "input.json", "--blocks", "5")
    assert len(rest) == 4
    assert set(first) == {spec.name for spec in INPUTS}
    assert content(first[REFERENCE_IMAGE.name]) == PORTRAIT.read_bytes()
    assert first[REFERENCE_IMAGE.name]["shape"] == [PORTRAIT.stat().st_size]
    assert first[PROMPT.name] == {"content": [DEMO_PROMPT], "shape": [1]}
    assert all(set(step) == {AUDIO.name} for step in rest)
    assert {tuple(step[AUDIO.name]["shape"]) for step in (first, *rest)} == {(BLOCK_SAMPLES,)}  # type: ignore[arg-type]


def test_speech_is_repeated_for_more_blocks_than_it_has() -> None:
    speech: Array = np.arange(1, BLOCK_SAMPLES + 11, dtype=np.int16)
    blocks = blocks_of(speech, 3)
    assert blocks.shape == (3, BLOCK_SAMPLES)
    assert np.array_equal(blocks.reshape(-1)[speech.size : speech.size + 5], speech[:5])


def test_nothing_to_say_is_refused() -> None:
    with pytest.raises(InputError, match=r"the speech has 0 samples; give one that says something"):
        blocks_of(np.zeros(0, np.int16))


def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .* choose another place"):
        write_input_data(tmp_path / "file" / "input.json", b"", "", blocks_of(np.ones(1, np.int16)))
