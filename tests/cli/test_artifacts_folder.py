"""Artifacts folders that are not what they should be, for the commands that take one."""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from live_avatar.graphs.artifacts import Artifacts
from tests.cli.support import assert_refused, invoke


@pytest.fixture
def copy(artifacts: Artifacts, tmp_path: Path) -> Path:
    return shutil.copytree(artifacts.folder, tmp_path / "copy")


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def other_version(folder: Path) -> None:
    edit(folder, lambda manifest: manifest.update(version="0.0.9"))


def other_format(folder: Path) -> None:
    edit(folder, lambda manifest: manifest.update(format=99))


def unknown_field(folder: Path) -> None:
    edit(folder, lambda manifest: manifest["preset"]["dit"].update(wings=2))


def impossible_size(folder: Path) -> None:
    edit(folder, lambda manifest: manifest["preset"]["dit"].update(num_heads=3))


def no_preset(folder: Path) -> None:
    edit(folder, lambda manifest: manifest.pop("preset"))


def list_as_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


def half_a_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:100])


def binary_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"\xff\xfe\x00")


def deep_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[" * 100_000)


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def lost_weights(folder: Path) -> None:
    (folder / "dit.weights").unlink()


def short_weights(folder: Path) -> None:
    (folder / "dit.weights").write_bytes(b"short")


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


FAULTS: dict[Callable[[Path], object], str] = {
    gone: "does not exist",
    a_file: "is not a folder",
    no_manifest: "has no manifest.json, so it is not a complete artifacts folder",
    half_a_manifest: "is not a manifest (",
    binary_manifest: "is not a manifest (",
    list_as_manifest: "is not a manifest (",
    deep_manifest: "is not a manifest (it is nested too deeply)",
    other_version: "was made by version 0.0.9 (format 7); this is version",
    other_format: "(format 99); this is version",
    unknown_field: "does not describe a preset of this version (",
    impossible_size: "does not describe a preset of this version (dim 128 is not a multiple of 3 heads",
    no_preset: "does not describe a preset of this version ('preset')",
    lost_weights: "dit.weights should have",
    short_weights: "but there is 5 bytes",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_folders_that_cannot_be_used(
    copy: Path, inputs: Path, image: Path, tmp_path: Path, fault: Callable[[Path], object]
) -> None:
    fault(copy)
    files = ("--audio", inputs / "short.wav", "--image", image, "--output", tmp_path / "a.mp4")
    remedy = f"; make it with `live-avatar export --preset tiny --output {copy}`."
    for result in (invoke("generate", "--artifacts", copy, *files), invoke("serve", "--artifacts", copy)):
        assert_refused(result, FAULTS[fault], remedy)
    assert not (tmp_path / "a.mp4").exists()


def test_a_damaged_graph(copy: Path, inputs: Path, image: Path, tmp_path: Path) -> None:
    graph = copy / "dit.onnx"
    graph.write_bytes(bytes(graph.stat().st_size))
    words = ("--audio", inputs / "short.wav", "--image", image, "--output", tmp_path / "a.mp4", "--artifacts", copy)
    assert_refused(invoke("generate", *words), f"{graph} has digest ", "; export the artifacts again.")


def test_another_preset_than_asked_for(artifacts: Artifacts, inputs: Path, image: Path, tmp_path: Path) -> None:
    files = ("--audio", inputs / "short.wav", "--image", image, "--output", tmp_path / "a.mp4")
    result = invoke("generate", "--artifacts", artifacts.folder, "--preset", "s2v-14b", *files)
    assert_refused(result, "holds preset 'tiny', not 's2v-14b'; give --preset tiny or export s2v-14b.")


@pytest.mark.parametrize(
    "words",
    [
        ("--checkpoint", "weights"),
        ("--lora", "adapter.safetensors"),
        ("--precision", "float16"),
        ("--lookahead-ms", "40"),
        ("--sink-update-block", "0"),
        ("--drop-idle-step",),
    ],
)
def test_options_that_artifacts_settle(
    artifacts: Artifacts, inputs: Path, image: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    files = ("--audio", inputs / "short.wav", "--image", image, "--output", tmp_path / "a.mp4")
    result = invoke("generate", "--artifacts", artifacts.folder, *files, *words)
    assert_refused(result, f"--artifacts already fixes {words[0]}; leave that out")


def test_the_demo_does_not_export_over_another_preset(copy: Path, tmp_path: Path) -> None:
    edit(copy, lambda manifest: (manifest["preset"].update(name="s2v-14b"), manifest.update(version="0.0.9")))
    before = (copy / "manifest.json").read_bytes()
    result = invoke("demo", "--artifacts", copy, "--output", tmp_path / "a.mp4")
    assert_refused(result, "holds preset 's2v-14b', and this command needs 'tiny'; give other --artifacts.")
    assert (copy / "manifest.json").read_bytes() == before


def test_export_does_not_replace_what_is_no_artifacts_folder(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").touch()
    result = invoke("export", "--output", tmp_path / "letters")
    assert_refused(result, "exists and is not an artifacts folder; choose another --output or remove it.")
    result = invoke("export", "--output", tmp_path / "letters" / "dear.txt" / "tiny")
    assert_refused(result, "dear.txt: File exists; use a writable path with free space.")
    result = invoke("export", "--output", tmp_path / "a", "--checkpoint", tmp_path / "none")
    assert_refused(result, "checkpoint", "none does not exist; give the folder that holds the weights.")
    assert [path.name for path in tmp_path.iterdir()] == ["letters"]


@pytest.mark.parametrize("name", ["my tmp", "врем", "a'b", "a$b", "a&b", "a;b", "a(b"])
@pytest.mark.parametrize("command", ["serve", "demo"])
def test_temporary_folders_that_stages_cannot_start_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / name))
    monkeypatch.setattr(tempfile, "tempdir", None)
    result = invoke(command, "--artifacts", tmp_path)
    assert_refused(result, f"{str(tmp_path / name)!r}, where Triton cannot start its stages; set TMPDIR to a path of")


@pytest.mark.parametrize("option", ["--artifacts", "--label-font", "--trace"])
def test_paths_that_stages_cannot_read(tmp_path: Path, option: str) -> None:
    place = tmp_path / "мой дом"
    place.mkdir()
    (tmp_path / "link").symlink_to(place)
    for path in (place, tmp_path / "link"):
        options = {"--artifacts": tmp_path, option: path}
        result = invoke("serve", *itertools.chain(*options.items()))
        assert_refused(result, f"{option} is at {str(place)!r}, which the stages cannot read; move it to a path of")


def test_a_generated_video_beside_names_of_any_letters(
    artifacts: Artifacts, inputs: Path, image: Path, tmp_path: Path
) -> None:
    place = tmp_path / "мой дом"
    shutil.copytree(artifacts.folder, place)
    files = ("--audio", inputs / "short.wav", "--image", image, "--output", place / "видео.mp4")
    result = invoke("generate", "--artifacts", place, *files)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"Wrote {place / 'видео.mp4'} (1 frames).\n"
