"""The memory of an export is that of the command's own process, against the files that it wrote."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from export.synthetic import official_preset, write_checkpoint
from live_avatar.config import VAEConfig
from perf.export_memory import main, peak_bytes
from tests.export.conftest import LEAST

MIB = 2**20


def test_memory_that_a_process_takes_is_seen_and_told_by_kind() -> None:
    taken = "import time; block = bytearray(100 * 2**20); time.sleep(2)"
    code, peaks = peak_bytes([sys.executable, "-c", taken])
    assert code == 0
    assert 100 * MIB < peaks["RssAnon"] < 150 * MIB
    assert peaks["RssAnon"] < peaks["total"] <= peaks["RssAnon"] + peaks["RssFile"] + peaks["RssShmem"]


@pytest.mark.slow
def test_an_export_is_measured_against_its_largest_file(tmp_path: Path) -> None:
    write_checkpoint(official_preset(replace(LEAST, vae=VAEConfig(dim=4)), {}), tmp_path / "weights", seed=None)
    words = ["--checkpoint", str(tmp_path / "weights"), "--height", "64", "--width", "64", "--steps", "1"]
    path = tmp_path / "figures.json"
    result = CliRunner().invoke(main, ["--json", str(path), "--", *words, "--output", str(tmp_path / "artifacts")])
    assert result.exit_code == 0, result.output
    report = json.loads(result.output.splitlines()[-1])
    assert report == json.loads(path.read_text())
    files = {file.name: file.stat().st_size for file in (tmp_path / "artifacts").iterdir() if file.suffix != ".json"}
    largest = max(files, key=lambda name: files[name])
    assert report["largest_file"] == {"name": largest, "bytes": files[largest]}
    assert report["peak_over_largest_file"] == pytest.approx(report["peak_bytes"]["total"] / files[largest], abs=1e-3)
    assert report["peak_bytes"]["total"] > 100 * MIB  # Python with torch


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        ([], 2, "the export's options have no --output; give them after `--`"),
        (
            ["--output=nowhere/a", "--checkpoint", "nowhere"],
            1,
            "the export ended with code 2; what it said stands above.",
        ),
    ],
)
def test_an_export_that_does_not_run(words: list[str], code: int, sentence: str) -> None:
    result = CliRunner().invoke(main, ["--", *words])
    assert result.exit_code == code
    assert sentence in result.output
