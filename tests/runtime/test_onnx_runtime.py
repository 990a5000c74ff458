"""What ONNX Runtime is not asked to run, and graphs that have run before."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from live_avatar.arrays import Array, Arrays
from live_avatar.errors import ArtifactError
from live_avatar.graphs.artifacts import TOKENIZER, Artifacts, load_artifacts
from live_avatar.runtime.onnx_runtime import OnnxGraph, OnnxRuntime


def test_bfloat16_is_refused_with_what_to_do(artifacts: Artifacts) -> None:
    low = replace(artifacts, preset=artifacts.preset.with_precision("bfloat16"))
    message = r"is in bfloat16, which ONNX Runtime does not run on a CPU; export it with --precision float32, or serve"
    with pytest.raises(ArtifactError, match=message):
        OnnxRuntime(low)


@pytest.mark.parametrize("name", ["dit.onnx", "dit.weights"])
def test_a_graph_whose_files_were_changed_is_refused(artifacts: Artifacts, tmp_path: Path, name: str) -> None:
    """Of the same size, as a stage finds them that comes back."""
    shutil.copytree(artifacts.folder, tmp_path / "copy")
    runtime = OnnxRuntime(load_artifacts(tmp_path / "copy"))
    path = tmp_path / "copy" / name
    data = path.read_bytes()
    path.with_suffix(".new").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    path.with_suffix(".new").replace(path)
    with pytest.raises(ArtifactError, match=rf"{name} has digest .*, so it was changed after the export"):
        runtime.graph("dit")
    runtime.graph("audio_tokens")


def test_a_tokenizer_that_was_changed_is_refused(artifacts: Artifacts, tmp_path: Path) -> None:
    (tmp_path / TOKENIZER).write_text("{}")
    files = {TOKENIZER: {"bytes": 2, "digest": "0" * 64}}
    changed = replace(artifacts, folder=tmp_path, manifest={**artifacts.manifest, "files": files})
    with pytest.raises(ArtifactError, match=r"tokenizer.json has digest 44136fa355b3, expected 000000000000 as in"):
        OnnxRuntime(changed)


def test_a_warm_graph_has_run_in_every_profile_when_it_is_given_out(
    artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every component: what it is run on fits the graph, and what it then gives is the same to the bit."""
    ran: list[set[str]] = []
    run = OnnxGraph.run

    def recorded(graph: OnnxGraph, inputs: Arrays) -> dict[str, Array]:
        ran.append(set(inputs))
        return run(graph, inputs)

    monkeypatch.setattr(OnnxGraph, "run", recorded)
    warm = OnnxRuntime(artifacts, warm=True)
    for name, contract in artifacts.contracts.items():
        warm.graph(name)
        assert ran == [{spec.name for spec in contract.inputs}] * max(1, len(contract.profiles))
        ran.clear()
    OnnxRuntime(artifacts).graph("audio_tokens")
    assert not ran
    shape = artifacts.contracts["audio_tokens"].shape(artifacts.contracts["audio_tokens"].inputs[0], 1)
    states = np.random.default_rng(0).standard_normal(shape, np.float32)
    first, second = (r.graph("audio_tokens").run({"states": states}) for r in (warm, OnnxRuntime(artifacts)))
    assert all(np.array_equal(first[name], second[name]) for name in first)
