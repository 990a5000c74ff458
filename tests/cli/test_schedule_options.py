"""The number of steps and the noise levels, as `export` and `generate` take them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.support import assert_refused, invoke

ONE_OF_THEM = "--steps, --sigmas and --drop-idle-step exclude each other; give one of them"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--steps", "0"), "'--steps': 0 is not in the range x>=1"),
        (("--sigmas", "1,x"), "'--sigmas': '1,x' is not a list of numbers, such as 1,0.5,0"),
        (("--sigmas", ""), "'--sigmas': '' is not a list of numbers, such as 1,0.5,0"),
        (("--sigmas", "0"), "sigmas (0.0,) must fall from at most 1 to exactly 0; give at least two."),
        (("--sigmas", "0.5,0.7,0"), "sigmas (0.5, 0.7, 0.0) must fall from at most 1 to exactly 0"),
        (("--sigmas", "1,nan,0"), "sigmas (1.0, nan, 0.0) must fall from at most 1 to exactly 0"),
        (("--steps", "3", "--drop-idle-step"), ONE_OF_THEM),
        (("--sigmas", "1,0", "--drop-idle-step"), ONE_OF_THEM),
        (("--sigmas", "1,0", "--steps", "1"), ONE_OF_THEM),
    ],
)
def test_a_schedule_that_is_none_is_one_sentence(
    inputs: Path, image: Path, tmp_path: Path, words: tuple[str, ...], sentence: str
) -> None:
    speech = ("--audio", inputs / "short.wav", "--image", image, "--output", tmp_path / "a.mp4")
    for result in (invoke("generate", *speech, *words), invoke("export", "--output", tmp_path / "tiny", *words)):
        assert_refused(result, sentence)
    assert list(tmp_path.iterdir()) == []
