"""The true widths on a CPU: one layer of the 14B transformer at 704x384, through files, adapter, ONNX and back.

Minutes and 20 GB of memory; `make test-slow`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from export import compare, synthetic
from live_avatar.cli.main import main as cli
from live_avatar.config import S2V_14B
from live_avatar.graphs.artifacts import load_artifacts

SIZES = ("--layers", "1", "--text-layers", "1", "--text-vocab", "1024", "--speech-layers", "1")


@pytest.mark.slow
def test_a_layer_of_the_14b_transformer_equals_torch_on_onnx_runtime(tmp_path: Path) -> None:
    weights, adapter, artifacts = tmp_path / "weights", tmp_path / "adapter.safetensors", tmp_path / "artifacts"
    made = CliRunner().invoke(
        synthetic.main, ["--preset", "s2v-14b", *SIZES, "--output", str(weights), "--lora", str(adapter)]
    )
    assert made.exit_code == 0, made.output
    words = ("--checkpoint", weights, "--lora", adapter)
    exported = CliRunner().invoke(cli, ["export", *map(str, words), "--output", str(artifacts)])
    assert exported.exit_code == 0, exported.output
    loaded = load_artifacts(artifacts)
    dit, stream = loaded.preset.dit, loaded.preset.stream
    assert (dit.dim, dit.num_heads, stream) == (S2V_14B.dit.dim, S2V_14B.dit.num_heads, S2V_14B.stream)
    assert (stream.block_tokens, stream.sink_tokens) == (3168, 2640)  # spec sections 1 and 11
    assert (artifacts / "dit.weights").stat().st_size > 2**31  # beyond what a graph itself can hold
    components = ("--component", "dit", "--component", "dit_text")
    compared = CliRunner().invoke(compare.main, ["--artifacts", str(artifacts), *map(str, words), *components])
    assert compared.exit_code == 0, compared.output
