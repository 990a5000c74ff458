"""Presets that the tests of the exporter export."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from export.calibrate import calibrate
from live_avatar.config import TINY, VAEConfig
from live_avatar.exporter.build import export_artifacts
from live_avatar.exporter.quantization import Calibration
from live_avatar.graphs.artifacts import MANIFEST, Artifacts, load_artifacts
from live_avatar.weights.checkpoint import open_checkpoint
from tests.conftest import noise_speech
from tests.support.artifacts import made_once

LEAST = replace(
    TINY,
    name="least",
    dit=replace(
        TINY.dit,
        dim=32,
        num_heads=2,
        num_layers=1,
        ffn_dim=16,
        text_dim=16,
        text_len=8,
        audio_dim=32,
        audio_states=2,
        audio_inject_layers=(0,),
    ),
    vae=VAEConfig(dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=0),
    speech=replace(
        TINY.speech,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    ),
    text=replace(TINY.text, d_model=16, d_kv=16, d_ff=16, num_layers=1, num_heads=2),
    stream=replace(TINY.stream, height=64, width=64, steps=1, sink_update_block=2),
)
"""Heads of 16 channels: fused kernels need 12."""
TWO_STEPS = LEAST.with_stream(steps=2)
CALIBRATED_BLOCKS = 2

"""Small networks for tests that run them; its graphs are its own."""
FP8_CACHE = LEAST.with_stream(steps=4).with_kv_cache_dtype("fp8")
"""Past keys and values in FP8, for the four steps of a pipe. Of the graphs of `LEAST` only `dit` differs."""
OTHER = replace(TINY, name="other", weight_seed=1)
"""The graphs of `tiny`, which a run of the tests traces once, with random weights."""


def old_artifacts(folder: Path) -> Path:
    """A folder as another version left it."""
    folder.mkdir()
    manifest = {"format": 0, "version": "0.0.1", "contracts": {}, "files": {}}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (folder / "dit_step_99.onnx").write_bytes(b"old")
    return folder


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`exported/artifacts` is `OTHER`, exported over what another version left; `told` has its progress."""

    def export(folder: Path) -> None:
        parent = folder / "exported"
        parent.mkdir()
        told: list[str] = []
        export_artifacts(open_checkpoint(OTHER), old_artifacts(parent / "artifacts"), told.append)
        (folder / "told").write_text("\n".join(told))

    return made_once(tmp_path_factory, OTHER.name, export)


@pytest.fixture(scope="session")
def other_told(other_folder: Path) -> list[str]:
    """What the export of `other_artifacts` reported of its progress."""
    return (other_folder / "told").read_text().splitlines()


@pytest.fixture(scope="session")
def other_artifacts(other_folder: Path) -> Artifacts:
    """`OTHER`, exported; tests must not change it."""
    return load_artifacts(other_folder / "exported" / "artifacts")


@pytest.fixture(scope="session")
def calibration(picture: bytes) -> Calibration:
    checkpoint, speech = open_checkpoint(TWO_STEPS), noise_speech(0.48 * CALIBRATED_BLOCKS)
    return calibrate(checkpoint, picture, "", speech, CALIBRATED_BLOCKS, seed=1)
