"""A folder that is whole, and every way in which it may not be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from live_avatar.errors import ArtifactError
from live_avatar.graphs.artifacts import FORMAT, MANIFEST, load_artifacts
from live_avatar.graphs.contract import contracts
from live_avatar.graphs.digests import file_sha256
from live_avatar.version import __version__
from tests.support.networks import SMALL

REMEDY = r"make it with `live-avatar export --preset tiny --output .*`\."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files that stand for graphs, and a true manifest."""
    made = tmp_path / "made"
    made.mkdir()
    (made / "dit.onnx").write_bytes(b"graph" * 10)
    (made / "dit.weights").write_bytes(bytes(range(256)))
    files = {path.name: {"bytes": path.stat().st_size, "digest": file_sha256(path)} for path in made.iterdir()}
    manifest = {
        "format": FORMAT,
        "version": __version__,
        "preset": SMALL.to_dict(),
        "contracts": {name: contract.to_dict() for name, contract in contracts(SMALL).items()},
        "files": files,
    }
    (made / MANIFEST).write_text(json.dumps(manifest))
    return made


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_a_whole_folder_is_read(folder: Path) -> None:
    artifacts = load_artifacts(folder)
    assert artifacts.preset == SMALL
    assert artifacts.contracts == contracts(SMALL)
    assert artifacts.graph_path("dit") == folder / "dit.onnx"
    artifacts.verify()


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=rf"artifacts folder .*nowhere does not exist; {REMEDY}"):
        load_artifacts(tmp_path / "nowhere")


def test_a_missing_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    message = rf"has no manifest\.json, so it is not a complete artifacts folder; {REMEDY}"
    with pytest.raises(ArtifactError, match=message):
        load_artifacts(folder)


@pytest.mark.parametrize(
    "text",
    ['{"format": 1, "ver', "", "[]", "null", '{"version": "0.1.0"}', "\x00", "[" * 100_000, '{"format":' * 100_000],
)
def test_a_broken_manifest(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match=rf"manifest\.json is not a manifest \(.*\); {REMEDY}"):
        load_artifacts(folder)


def test_a_manifest_that_is_nested_too_deeply(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"format":' * 100_000)
    with pytest.raises(ArtifactError, match=rf"is not a manifest \(it is nested too deeply\); {REMEDY}"):
        load_artifacts(folder)


def test_a_manifest_that_is_not_text(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtifactError, match=rf"manifest\.json is not a manifest \(.*\); {REMEDY}"):
        load_artifacts(folder)


def test_another_version(folder: Path) -> None:
    edit(folder, lambda manifest: manifest.update(version="0.0.9"))
    expected = rf"was made by version 0\.0\.9 \(format {FORMAT}\); this is version .* \(format {FORMAT}\); {REMEDY}"
    with pytest.raises(ArtifactError, match=expected):
        load_artifacts(folder)


def test_another_format(folder: Path) -> None:
    edit(folder, lambda manifest: manifest.update(format=99))
    with pytest.raises(ArtifactError, match=r"\(format 99\); this is version"):
        load_artifacts(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda manifest: manifest.pop("preset"), "'preset'"),
        (lambda manifest: manifest["preset"]["dit"].update(dim=127), "dim 127 is not a multiple of 4 heads"),
        (lambda manifest: manifest["preset"]["stream"].update(surprise=1), "surprise"),
        (lambda manifest: manifest["preset"].update(kv_cache_dtype="fp4"), "kv_cache_dtype 'fp4' is unknown; choose"),
        (
            lambda manifest: manifest["contracts"]["dit"]["inputs"][-1].update(dtype="float4"),
            r"history_v\.5 has type 'float4'; expected one of float32, .*, float8_e4m3fn, int64, uint8\.",
        ),
        (lambda manifest: manifest.update(files=[]), "has no attribute 'items'"),
        (lambda manifest: manifest["files"]["dit.weights"].pop("digest"), "'digest'"),
        (lambda manifest: manifest["files"]["dit.weights"].update(digest=None), "a digest is not a string"),
    ],
)
def test_a_manifest_of_something_else(folder: Path, change: Callable[[dict[str, Any]], object], reason: str) -> None:
    edit(folder, change)
    message = rf"does not describe a preset of this version \(.*{reason}.*\); {REMEDY}"
    with pytest.raises(ArtifactError, match=message):
        load_artifacts(folder)


def test_a_missing_file(folder: Path) -> None:
    (folder / "dit.weights").unlink()
    with pytest.raises(
        ArtifactError, match=rf"dit\.weights should have 256 bytes, but there is no such file; {REMEDY}"
    ):
        load_artifacts(folder)


def test_a_truncated_file(folder: Path) -> None:
    (folder / "dit.weights").write_bytes(bytes(100))
    with pytest.raises(ArtifactError, match=rf"dit\.weights should have 256 bytes, but there is 100 bytes; {REMEDY}"):
        load_artifacts(folder)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)


CHANGED = r"has digest [0-9a-f]{12}, expected [0-9a-f]{12} as in manifest\.json, so it was changed after the export; "


def test_a_flipped_byte_is_found_by_verify_alone(folder: Path) -> None:
    flip_a_byte(folder / "dit.weights")
    artifacts = load_artifacts(folder)
    with pytest.raises(ArtifactError, match=rf"dit\.weights {CHANGED}export the artifacts again\."):
        artifacts.verify()


@pytest.mark.parametrize("name", ["dit.onnx", "dit.weights"])
def test_a_component_is_read_only_if_its_files_are_those_of_the_manifest(folder: Path, name: str) -> None:
    artifacts = load_artifacts(folder)
    with artifacts.reading("dit") as path:
        assert path == folder / "dit.onnx"
    flip_a_byte(folder / name)
    with pytest.raises(ArtifactError, match=rf"{name} {CHANGED}"), artifacts.reading("dit"):
        pytest.fail("it was read")


def test_a_file_that_is_replaced_while_it_is_read_is_found(folder: Path) -> None:
    with (
        pytest.raises(ArtifactError, match=rf"dit\.weights {CHANGED}"),
        load_artifacts(folder).reading("dit"),
    ):
        flip_a_byte(folder / "dit.weights")


def test_a_file_that_the_manifest_does_not_list_is_not_read(folder: Path) -> None:
    artifacts = load_artifacts(folder)
    (folder / "vae_encoder.onnx").write_bytes(b"graph")
    message = r"manifest\.json does not list vae_encoder\.onnx; export the artifacts again\."
    with pytest.raises(ArtifactError, match=message), artifacts.reading("vae_encoder"):
        pytest.fail("it was read")


def test_a_file_that_has_gone_is_told(folder: Path) -> None:
    artifacts = load_artifacts(folder)
    (folder / "dit.weights").unlink()
    with pytest.raises(ArtifactError, match=r"artifacts in .* cannot be read \(.*dit\.weights'\); export them again\."):
        artifacts.verify()


def test_an_unknown_component(folder: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no component 'dit_step_9'; it has audio_tokens, dit, .*"):
        load_artifacts(folder).graph_path("dit_step_9")


def test_the_fingerprint_is_of_the_files(folder: Path) -> None:
    before = load_artifacts(folder).fingerprint
    assert before == load_artifacts(folder).fingerprint
    assert len(before) == 12
    (folder / "dit.weights").write_bytes(bytes(256))
    changed = {"bytes": 256, "digest": file_sha256(folder / "dit.weights")}
    edit(folder, lambda manifest: manifest["files"].update({"dit.weights": changed}))
    assert load_artifacts(folder).fingerprint != before
