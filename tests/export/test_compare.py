"""ONNX equals torch: every component, at every extent, and a whole stream."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from export.compare import (
    COARSE_TOLERANCE,
    FLOAT16_TOLERANCE,
    PIXEL_TOLERANCE,
    RELATIVE_TOLERANCE,
    SPEECH_TOLERANCE,
    Difference,
    compare,
    main,
)
from live_avatar.config import TINY
from live_avatar.exporter.build import export_artifacts
from live_avatar.graphs.artifacts import MANIFEST, Artifacts
from live_avatar.graphs.contract import contracts
from live_avatar.graphs.digests import file_sha256
from live_avatar.pipeline.generator import GeneratedBlock, Generator
from live_avatar.runtime import Runtime
from live_avatar.runtime.onnx_runtime import OnnxRuntime
from live_avatar.runtime.torch_runtime import TorchRuntime
from live_avatar.weights.checkpoint import open_checkpoint
from tests.conftest import SEED, noise_speech
from tests.export.conftest import LEAST
from tests.tolerances import EXPORT, EXPORTED_STREAM, OTHER_LEVEL_SHARE

COMPONENTS = list(contracts(TINY))


@pytest.fixture(scope="module")
def differences(artifacts: Artifacts) -> dict[str, Difference]:
    return {difference.component: difference for difference in compare(artifacts, open_checkpoint(TINY), seed=5)}


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_component_on_onnx_runtime_equals_torch(differences: dict[str, Difference], component: str) -> None:
    assert differences[component].relative <= EXPORT
    assert differences[component].pixels <= PIXEL_TOLERANCE
    assert differences[component].within


def test_the_commands_tolerance_is_the_tests() -> None:
    assert RELATIVE_TOLERANCE == EXPORT
    assert not Difference("x", relative=1.01 * EXPORT, pixels=0).within
    assert not Difference("x", relative=0, pixels=1.01 * PIXEL_TOLERANCE).within


def three_blocks(runtime: Runtime, picture: bytes) -> list[GeneratedBlock]:
    return list(Generator(runtime).generate(picture, "A person talks.", SEED, noise_speech(3 * 0.48)))


def test_a_stream_on_onnx_runtime_equals_torch(
    onnx_runtime: OnnxRuntime, torch_runtime: TorchRuntime, picture: bytes
) -> None:
    exported, oracle = three_blocks(onnx_runtime, picture), three_blocks(torch_runtime, picture)
    assert [block.first_frame for block in exported] == [0, 12, 24]
    for ours, expected in zip(exported, oracle, strict=True):
        error = np.abs(ours.latents - expected.latents).max() / np.abs(expected.latents).max()
        assert error <= EXPORTED_STREAM, f"latents of block {ours.index}"
        levels = np.abs(ours.frames.astype(int) - expected.frames.astype(int))
        assert levels.max() <= 1, f"frames of block {ours.index}"
        assert (levels > 0).mean() <= OTHER_LEVEL_SHARE, f"frames of block {ours.index}"


def test_onnx_runtime_gives_the_same_bits_twice(
    artifacts: Artifacts, onnx_runtime: OnnxRuntime, picture: bytes
) -> None:
    one, other = (
        list(Generator(r).generate(picture, "", 1, noise_speech(0.1))) for r in (onnx_runtime, OnnxRuntime(artifacts))
    )
    assert np.array_equal(one[0].latents, other[0].latents)
    assert np.array_equal(one[0].frames, other[0].frames)


def test_the_command_prints_every_component(other_artifacts: Artifacts) -> None:
    result = CliRunner().invoke(main, ["--artifacts", str(other_artifacts.folder)])
    assert result.exit_code == 0, result.output
    rows = result.output.splitlines()
    assert rows[0].split() == ["component", "relative", "error", "pixel", "levels"]
    assert [row.split()[0] for row in rows[1:]] == list(other_artifacts.contracts)
    assert "TOO LARGE" not in result.output


def test_the_command_finds_graphs_with_other_weights(other_artifacts: Artifacts, tmp_path: Path) -> None:
    folder = shutil.copytree(other_artifacts.folder, tmp_path / "changed")
    weights = np.fromfile(folder / "dit.weights", dtype=np.float32)
    (1.01 * weights).tofile(folder / "dit.weights")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["dit.weights"]["digest"] = file_sha256(folder / "dit.weights")
    (folder / MANIFEST).write_text(json.dumps(manifest))
    result = CliRunner().invoke(main, ["--artifacts", str(folder)])
    assert result.exit_code == 1
    marked = {row.split()[0] for row in result.output.splitlines() if row.endswith("TOO LARGE")}
    assert marked == {"dit", "dit_block_tokens", "dit_sink_tokens", "dit_text"}
    assert (
        "dit_block_tokens, dit_sink_tokens, dit_text, dit differ from torch by more than what their precision allows; "
        "export again." in result.output
    )


@pytest.mark.slow
def test_16_bits_have_a_tolerance_of_their_own(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(LEAST.with_precision("float16"))
    low = export_artifacts(checkpoint, tmp_path / "low", lambda component: None)
    found = {difference.component: difference for difference in compare(low, checkpoint, seed=5)}
    assert all(difference.within for difference in found.values()), found
    tolerances = [found[name].tolerance for name in ("vae_decoder", "dit", "speech_encoder")]
    assert tolerances == [COARSE_TOLERANCE, FLOAT16_TOLERANCE, SPEECH_TOLERANCE]


def test_the_command_says_what_is_wrong_with_a_folder(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--artifacts", str(tmp_path)])
    assert result.exit_code == 1
    assert f"has no {MANIFEST}, so it is not a complete artifacts folder" in result.output
