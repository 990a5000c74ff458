"""An artifacts folder is made whole, in place of an old one, or not at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from live_avatar.errors import CheckpointError, ExportError
from live_avatar.exporter.build import export_artifacts
from live_avatar.graphs.artifacts import MANIFEST, MODULATION, Artifacts, load_artifacts, weight_file
from live_avatar.graphs.contract import contracts
from live_avatar.version import __version__
from live_avatar.weights.checkpoint import open_checkpoint
from live_avatar.weights.tensors import SafetensorsWeights
from tests.export.conftest import OTHER, old_artifacts


class InterruptedExportError(Exception):
    """What a progress callback raises here, as Ctrl-C would."""


def interrupt(component: str) -> None:
    if component == "audio_tokens":  # the second: one graph has been written
        raise InterruptedExportError


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_old_artifacts_are_replaced_as_a_whole(other_artifacts: Artifacts) -> None:
    folder = other_artifacts.folder
    loaded = load_artifacts(folder)
    loaded.verify()
    assert loaded.preset == OTHER
    names = contracts(OTHER)
    expected = {MANIFEST, MODULATION, *(f"{name}.onnx" for name in names), *map(weight_file, names)}
    assert {path.name for path in folder.iterdir()} == expected
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_manifest_says_what_was_exported(other_artifacts: Artifacts) -> None:
    manifest = other_artifacts.manifest
    assert manifest["version"] == __version__
    assert manifest["opset"] == 23
    assert manifest["weights"]["dit"] == {"origin": f"random weights of seed {OTHER.weight_seed}"}
    assert set(manifest["weights"]) == {"dit", "vae", "speech", "text"}
    assert set(manifest["made_with"]) == {"torch", "onnx", "onnxruntime"}
    assert set(manifest["files"]) == {path.name for path in other_artifacts.folder.iterdir()} - {MANIFEST}
    assert other_artifacts.contracts == contracts(OTHER)


def test_every_component_is_told_once(other_artifacts: Artifacts, other_told: list[str]) -> None:
    assert sorted(other_told) == sorted(other_artifacts.contracts)


def test_an_interrupted_export_leaves_old_artifacts_and_nothing_else(tmp_path: Path) -> None:
    folder = old_artifacts(tmp_path / "artifacts")
    before = contents(tmp_path)
    with pytest.raises(InterruptedExportError):
        export_artifacts(open_checkpoint(OTHER), folder, interrupt)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["artifacts"]


def test_an_interrupted_first_export_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InterruptedExportError):
        export_artifacts(open_checkpoint(OTHER), tmp_path / "new" / "artifacts", interrupt)
    assert list((tmp_path / "new").iterdir()) == []


DEEP = pytest.param("[" * 100_000, id="nested too deeply")


@pytest.mark.parametrize(
    "manifest", [None, "{}", '{"name": "a web application", "icons": []}', "[1]", "not json", DEEP]
)
def test_a_folder_of_something_else_is_refused_and_left(tmp_path: Path, manifest: str | None) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter1.txt").write_text("dear")
    if manifest is not None:
        (folder / MANIFEST).write_text(manifest)
    before = contents(tmp_path)
    message = r"thesis exists and is not an artifacts folder; choose another --output or remove it\."
    with pytest.raises(ExportError, match=message):
        export_artifacts(open_checkpoint(OTHER), folder, interrupt)
    assert contents(tmp_path) == before


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("dear")
    with pytest.raises(ExportError, match=r"file exists and is not an artifacts folder"):
        export_artifacts(open_checkpoint(OTHER), tmp_path / "file", interrupt)


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    with pytest.raises(InterruptedExportError):  # it gets as far as exporting
        export_artifacts(open_checkpoint(OTHER), tmp_path, interrupt)


def test_a_checkpoint_that_is_not_there_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    folder = old_artifacts(tmp_path / "artifacts")
    before = contents(tmp_path)
    broken = replace(open_checkpoint(OTHER), parts={"dit": SafetensorsWeights(tmp_path / "dit.safetensors")})
    with pytest.raises(CheckpointError, match=r"dit\.safetensors does not exist"):
        export_artifacts(broken, folder, interrupt)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("component", "file"),
    [
        ("dit_sink_tokens", "dit.weights"),
        ("dit", "dit.weights"),
        ("vae_decoder_warm_up", "vae.weights"),
        ("audio_tokens", "audio_tokens.weights"),
    ],
)
def test_components_of_one_network_share_a_file(component: str, file: str) -> None:
    assert weight_file(component) == file
