"""The picture of a trace: drawn from intervals, refused with a sentence where there are none."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from live_avatar.serving.trace import TraceWriter
from perf.timeline import main


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    folder = tmp_path / "trace"
    folder.mkdir()
    for stage, name in enumerate(["conditioning", "dit_step_1", "vae_decoder"]):
        writer = TraceWriter.to_folder(name, folder)
        for block in range(4):
            writer.busy(7, block, stage + block, stage + block + 0.9)
        writer.close()
    return folder


def test_every_stage_and_block_is_drawn(trace: Path, tmp_path: Path) -> None:
    output = tmp_path / "timeline.png"
    result = CliRunner().invoke(main, [str(trace), "--output", str(output)])
    assert result.exit_code == 0, result.output
    image = Image.open(output).convert("RGB")
    assert image.width >= 800
    colours = {colour for _, colour in image.getcolors(maxcolors=1 << 20) or []}
    assert len(colours) > 4, "four blocks, four colours"


def test_an_empty_trace_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [str(tmp_path), "--output", str(tmp_path / "timeline.png")])
    assert result.exit_code != 0
    assert "the trace holds no intervals; stream something to a server" in result.output
    assert "Traceback" not in result.output
