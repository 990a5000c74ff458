"""Engines are built once for a machine and a graph, whole or not at all, and TensorRT's own words reach the user."""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from export.engines import main
from live_avatar.errors import ArtifactError, CapacityError, ExportError
from live_avatar.exporter.engines import LOCK, TIMING_CACHE, EngineOptions, build_engines
from live_avatar.graphs.artifacts import MANIFEST, Artifacts, load_artifacts
from live_avatar.graphs.digests import file_sha256
from live_avatar.graphs.engines import FOLDER, Engine, Target, engine_path, read_engines
from live_avatar.graphs.memory import WORKSPACE_BYTES
from tests.support.fake_tensorrt import HostDevice, OnnxParser, install

VERSION = "11.4.0.106"


@pytest.fixture
def artifacts_copy(other_artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifacts:
    """`OTHER` in a folder that a test may change, with the stand-in for TensorRT installed."""
    install(monkeypatch, VERSION)
    shutil.copytree(other_artifacts.folder, tmp_path / "other")
    return load_artifacts(tmp_path / "other")


def build(artifacts: Artifacts, options: EngineOptions | None = None) -> list[str]:
    """What building told of its progress."""
    told: list[str] = []
    build_engines(artifacts.folder, options or EngineOptions(), told.append, HostDevice)
    return told


def plan(artifacts: Artifacts, component: str) -> dict[str, object]:
    """What the stand-in's builder was asked for."""
    return json.loads(engine_path(artifacts, component).read_bytes())


def test_every_graph_becomes_an_engine_with_a_record(artifacts_copy: Artifacts) -> None:
    told = build(artifacts_copy)
    engines = read_engines(artifacts_copy)
    assert engines.keys() == artifacts_copy.contracts.keys()
    known = artifacts_copy.manifest["files"]
    step = engines["dit"]
    assert step == Engine(
        target=Target("tensorrt", VERSION, ("9.0",), "stand-in"),
        files={name: known[name]["digest"] for name in ("dit.onnx", "dit.weights")},
        weights_on_host=False,
        build_s=step.build_s,
        bytes=engine_path(artifacts_copy, "dit").stat().st_size,
        digest=file_sha256(engine_path(artifacts_copy, "dit")),
    )
    assert step.build_s >= 0
    message = "dit: has not been built; building with TensorRT 11.4.0.106 on stand-in (compute capability 9.0)"
    assert message in told
    assert f"dit: {step.bytes} bytes in {step.build_s} s" in told


def test_the_graphs_stay_as_they_were(artifacts_copy: Artifacts) -> None:
    build(artifacts_copy)
    load_artifacts(artifacts_copy.folder).verify()


@pytest.mark.parametrize("version", ["10.15.1.29", "11.0.0.114", VERSION])
def test_types_are_those_of_the_graph_in_every_version(
    artifacts_copy: Artifacts, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    install(monkeypatch, version)
    build(artifacts_copy)
    made = plan(artifacts_copy, "dit")
    assert made["version"] == version
    assert made["strongly_typed"] is True
    assert made["flags"] == []  # TF32, which is on by default, is off
    assert made["workspace"] == WORKSPACE_BYTES


def test_attention_may_be_decomposed_where_nothing_is_fused(artifacts_copy: Artifacts) -> None:
    build(artifacts_copy)
    injections = len(artifacts_copy.preset.dit.audio_inject_layers)
    attentions = 2 * artifacts_copy.preset.dit.num_layers + injections  # of tokens, of text, of audio
    assert plan(artifacts_copy, "dit")["decomposable"] == [1] * attentions


def test_the_profiles_have_the_ranges_of_the_contract(artifacts_copy: Artifacts) -> None:
    build(artifacts_copy)
    contract = artifacts_copy.contracts["dit"]
    block, sink = plan(artifacts_copy, "dit")["profiles"]
    heads, width = artifacts_copy.preset.dit.num_heads, artifacts_copy.preset.dit.head_dim
    expected = [[1, heads, tokens, width] for tokens in contract.profiles["block"]["history_tokens"]]
    assert block["history_v.0"] == expected
    assert block["history_v.0"][0][2] == 0
    for name, shapes in block.items():
        assert name.startswith("history") or shapes[0] == shapes[1] == shapes[2], name
    assert sink["history_v.0"] == sink["sink_k.0"] == [[1, heads, 0, width]] * 3
    tokens = contract.profiles["sink"]["tokens"][0]
    assert sink["tokens"] == [[1, tokens, artifacts_copy.preset.dit.dim]] * 3
    assert plan(artifacts_copy, "text_encoder")["profiles"] == []


def test_engines_that_are_up_to_date_are_kept(artifacts_copy: Artifacts) -> None:
    build(artifacts_copy)
    folder = artifacts_copy.folder / FOLDER
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != LOCK}
    assert build(artifacts_copy) == [f"{name}: up to date" for name in artifacts_copy.contracts]
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != LOCK} == before


def test_only_the_components_asked_for_are_built(artifacts_copy: Artifacts) -> None:
    build(artifacts_copy, EngineOptions(components=["audio_tokens"]))
    assert read_engines(artifacts_copy).keys() == {"audio_tokens"}


def test_rebuild_makes_them_again(artifacts_copy: Artifacts) -> None:
    options = EngineOptions(components=["audio_tokens"], rebuild=True)
    build(artifacts_copy, options)
    assert any("is built again, as asked; building" in line for line in build(artifacts_copy, options))


def test_another_tensorrt_builds_them_again(artifacts_copy: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    options = EngineOptions(components=["audio_tokens"])
    build(artifacts_copy, options)
    install(monkeypatch, "11.5.0.1")
    told = build(artifacts_copy, options)
    assert told[0].startswith("audio_tokens: was built by TensorRT 11.4.0.106 on stand-in")
    assert read_engines(artifacts_copy)["audio_tokens"].target.version == "11.5.0.1"


def test_weights_move_to_the_host_on_request(artifacts_copy: Artifacts) -> None:
    components = ["audio_tokens", "text_encoder"]
    build(artifacts_copy, EngineOptions(components=components))
    told = build(artifacts_copy, EngineOptions(components=components, weights_on_host=["text_encoder"]))
    assert told[0] == "audio_tokens: up to date"
    assert told[1].startswith("text_encoder: has its weights on the GPU; building")
    assert plan(artifacts_copy, "text_encoder")["flags"] == ["WEIGHT_STREAMING"]
    assert read_engines(artifacts_copy)["text_encoder"].weights_on_host


def test_the_timing_cache_is_kept_and_used(artifacts_copy: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in's cache is its version and a mark for every engine built with it."""
    options = EngineOptions(components=["audio_tokens"], rebuild=True)
    cache = artifacts_copy.folder / FOLDER / TIMING_CACHE
    build(artifacts_copy, options)
    build(artifacts_copy, options)
    assert cache.read_bytes() == b"11.4.0.106+1+1"
    install(monkeypatch, "11.5.0.1")
    build(artifacts_copy, options)
    assert cache.read_bytes() == b"11.5.0.1+1"  # one of another version is not taken


def test_what_the_parser_cannot_read_is_told_in_its_words(
    artifacts_copy: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnnxParser, "known", {"MatMul", "Add"})
    message = (
        r"TensorRT 11.4.0.106 cannot read .*audio_tokens.onnx: No importer registered for op: Concat; .*; export it"
    )
    with pytest.raises(ExportError, match=message):
        build(artifacts_copy, EngineOptions(components=["audio_tokens"]))


def test_a_failed_build_is_told_in_tensorrts_words_and_leaves_what_was_built(artifacts_copy: Artifacts) -> None:
    path = artifacts_copy.folder / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["contracts"]["dit"]["profiles"] = {}  # so that no profile is made, which TensorRT demands
    path.write_text(json.dumps(manifest))
    message = (
        r"TensorRT 11.4.0.106 cannot build dit: 4: Network has dynamic inputs; 4: no optimization profile has been "
        r"defined for audio_global; see whether the GPU has room and this version"
    )
    with pytest.raises(ExportError, match=message):
        build(artifacts_copy, EngineOptions(components=["audio_tokens", "dit"]))
    assert read_engines(artifacts_copy).keys() == {"audio_tokens"}
    names = {item.name for item in (artifacts_copy.folder / FOLDER).iterdir()}
    assert names == {"audio_tokens.plan", "engines.json", LOCK, TIMING_CACHE}


def test_a_changed_graph_is_not_built(artifacts_copy: Artifacts) -> None:
    path = artifacts_copy.folder / "dit.weights"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ArtifactError, match=r"dit\.weights has digest .*; export the artifacts again"):
        build(artifacts_copy, EngineOptions(components=["dit"]))


def test_a_second_process_waits_and_then_finds_everything_built(artifacts_copy: Artifacts) -> None:
    options = EngineOptions(components=["audio_tokens"])
    build(artifacts_copy, options)
    told: list[str] = []
    waiting = threading.Event()

    def progress(line: str) -> None:
        told.append(line)
        waiting.set()

    second = threading.Thread(target=build_engines, args=(artifacts_copy.folder, options, progress, HostDevice))
    with (artifacts_copy.folder / FOLDER / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        second.start()
        assert waiting.wait(timeout=60)
        assert told[0].startswith("waiting for another process that builds engines (")
    second.join(timeout=60)
    assert told[1:] == ["audio_tokens: up to date"]


def test_an_unknown_component_is_refused(artifacts_copy: Artifacts) -> None:
    with pytest.raises(ExportError, match=r"has no component 'dit_step_9'; it has audio_tokens, dit, "):
        build(artifacts_copy, EngineOptions(components=["dit_step_9"]))


def test_what_does_not_fit_is_refused_before_anything_is_built(artifacts_copy: Artifacts) -> None:
    with pytest.raises(CapacityError, match=r"a denoising step of preset other with 2 sessions does not fit 1 GiB: "):
        build(artifacts_copy, EngineOptions(gpu_memory_gib=1, sessions=2))
    assert not (artifacts_copy.folder / FOLDER).exists()


def test_without_tensorrt_the_message_says_what_to_do(
    artifacts_copy: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ExportError, match=r"engines cannot be built here: TensorRT cannot be imported .*; install"):
        build(artifacts_copy)


def test_the_command_ends_with_a_sentence_where_there_is_no_such_gpu(artifacts_copy: Artifacts) -> None:
    result = CliRunner().invoke(main, ["--artifacts", str(artifacts_copy.folder), "--device", "99"])
    assert result.exit_code == 1
    assert "Error: engines cannot be built here: GPU 99 does not exist" in result.output
    assert "Traceback" not in result.output


def test_the_command_passes_its_options_on(artifacts_copy: Artifacts) -> None:
    result = CliRunner().invoke(
        main, ["--artifacts", str(artifacts_copy.folder), "--gpu-memory-gib", "1", "--sessions", "3"]
    )
    assert result.exit_code == 1
    assert "with 3 sessions does not fit 1 GiB" in result.output
