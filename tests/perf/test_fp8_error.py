"""The measurement of FP8's error runs, and a network against itself has none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from live_avatar.assets import SPEECH
from live_avatar.config import S2V_14B
from live_avatar.runtime.torch_runtime import TorchRuntime
from live_avatar.weights.checkpoint import open_checkpoint
from live_avatar_client.media import read_speech
from perf import fp8_error
from perf.fp8_error import cut, errors, main, record
from tests.export.conftest import LEAST

BLOCKS = 2
PAST = "past keys and values in FP8"


@pytest.mark.slow
def test_a_network_against_itself_has_no_error() -> None:
    runtime = TorchRuntime(open_checkpoint(LEAST))
    found = list(errors("itself", runtime, record(runtime, read_speech(SPEECH), BLOCKS)))
    assert [(error.step, error.block, error.relative_rms) for error in found] == [(1, 1, 0.0), (1, 2, 0.0)]
    assert [error.cosine for error in found] == [pytest.approx(1.0)] * BLOCKS


@pytest.mark.slow
def test_the_command_writes_a_table_and_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_error, "TINY", LEAST)
    path = tmp_path / "figures.json"
    result = CliRunner().invoke(main, ["--blocks", str(BLOCKS), "--json", str(path)])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    report = json.loads(path.read_text())
    assert json.loads(lines[-1]) == report
    variants = ["bfloat16", PAST, "FP8 as released", "FP8 in ONNX", "FP8 in ONNX, dynamic"]
    assert lines[0] == f"| step | block | {' | '.join(variants)} |"
    assert [line.split(" | ")[1] for line in lines[2:4]] == ["1", "2"]
    rms = {(entry["variant"], entry["block"]): entry["relative_rms"] for entry in report["results"]}
    for block in (1, 2):
        assert 0 < rms["bfloat16", block] < rms["FP8 as released", block] < 0.2
        for variant in ("FP8 in ONNX", "FP8 in ONNX, dynamic"):
            assert rms["bfloat16", block] < rms[variant, block] < 2 * rms["FP8 as released", block]
    assert rms[PAST, 1] == 0.0, "there is no past yet"
    assert 0 < rms[PAST, 2] < rms["FP8 as released", 2]


def test_a_cut_has_the_large_models_widths() -> None:
    preset = cut(5120, 2, 256)
    assert (preset.dit.num_heads, preset.dit.ffn_dim) == (S2V_14B.dit.num_heads, S2V_14B.dit.ffn_dim)
    assert preset.dit.audio_states == S2V_14B.dit.audio_states
    assert (preset.dit.num_layers, preset.dit.audio_inject_layers) == (2, (0,))
    assert preset.stream.block_tokens == 3 * 16 * 16
