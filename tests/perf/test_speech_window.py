"""The measurement of speech windows runs, and finds what a window must show."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from live_avatar.runtime.torch_runtime import TorchRuntime
from perf.speech_window import main, measure, streamed_features, table, whole_features
from tests.conftest import noise_speech
from tests.tolerances import FLOAT32


@pytest.mark.slow
def test_a_longer_window_and_lookahead_come_closer_to_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    options = ["--windows-blocks", "1,4,16", "--lookahead-ms", "0,240", "--json", str(path)]
    result = CliRunner().invoke(main, options)
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    figures = {(entry["window_blocks"], entry["lookahead_ms"]): entry for entry in report["results"]}
    assert set(figures) == {(1, 0), (4, 0), (4, 240), (16, 0), (16, 240)}
    rms = [figures[window, 0]["relative_rms"] for window in (16, 4, 1)]
    assert 0 < rms[0] < rms[1] < rms[2] < 1
    assert figures[16, 0]["cosine"] > figures[4, 0]["cosine"] > figures[1, 0]["cosine"]
    assert figures[16, 240]["relative_rms"] < rms[0]
    assert (report["preset"], report["audio"], report["runtime"]) == ("tiny", "speech.wav", "torch")
    rows = [row for row in result.output.splitlines() if row.startswith("|")]
    assert rows[0] == "| window | look-ahead 0 ms | look-ahead 240 ms |"
    shown = f"{rms[2]:.3f} / {figures[1, 0]['cosine']:.4f}"
    assert rows[2] == f"| 1 (0.48 s) | {shown} | – |"


def test_a_speech_inside_one_window_differs_by_nothing_once_it_is_all_heard(torch_runtime: TorchRuntime) -> None:
    """The last block of a speech of whole blocks has heard the same samples, normalised alike, as the whole file."""
    encoder, stream = torch_runtime.graph("speech_encoder"), torch_runtime.preset.stream
    speech = noise_speech(3 * 0.48)
    streamed, whole = streamed_features(encoder, stream, speech), whole_features(encoder, speech)
    assert streamed.shape == whole.shape == (5, 36, 48)
    np.testing.assert_allclose(streamed[:, 24:], whole[:, 24:], rtol=0, atol=FLOAT32)
    assert np.abs(streamed[:, :12] - whole[:, :12]).max() > 100 * FLOAT32


def test_the_longest_lookahead_still_gives_every_frame(torch_runtime: TorchRuntime) -> None:
    found = measure(torch_runtime, noise_speech(0.5), [4], [1440])
    assert [(entry.window_blocks, entry.lookahead_ms) for entry in found] == [(4, 1440)]
    assert found[0].cosine > 0.5
    assert "| 4 (1.92 s) |" in table(found)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--windows-blocks", "1,x"], 2, "'1,x' is not a list of whole numbers, such as 1,2,4,8,16."),
        (["--windows-blocks", "0"], 1, "speech_window_blocks is 0; at least 1 is needed."),
        (["--lookahead-ms", "30"], 1, "no look-ahead fits into a window"),
        (["--artifacts", "nowhere"], 1, "artifacts folder nowhere does not exist"),
        (["--audio", "nowhere.wav"], 1, "the speech 'nowhere.wav' does not exist"),
    ],
)
def test_mistakes_are_explained(options: list[str], code: int, message: str) -> None:
    single = ["--windows-blocks", "1"] if "--windows-blocks" not in options else []
    result = CliRunner().invoke(main, [*single, *options])
    assert result.exit_code == code
    assert message in result.output


def test_a_speech_without_a_frame_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.wav"
    with wave.open(str(path), "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(16_000)
        writer.writeframes(np.arange(100, dtype=np.int16).tobytes())  # not silent: the client warns of silence
    result = CliRunner().invoke(main, ["--audio", str(path)])
    assert result.exit_code == 1
    assert "the speech has 100 samples; at least one frame, 640, is needed." in result.output
