"""What ONNX Runtime is not asked to run, and graphs that have run before."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from live_avatar.arrays import Array, Arrays
from live_avatar.errors import ArtifactError
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.runtime.onnx_runtime import OnnxGraph, OnnxRuntime


def test_bfloat16_is_refused_with_what_to_do(artifacts: Artifacts) -> None:
    low = replace(artifacts, preset=artifacts.preset.with_precision("bfloat16"))
    message = r"is in bfloat16, which ONNX Runtime does not run on a CPU; export it with --precision float32, or serve"
    with pytest.raises(ArtifactError, match=message):
        OnnxRuntime(low)


def test_a_warm_graph_has_run_once_when_it_is_given_out(artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert ran.pop() == {spec.name for spec in contract.inputs}
        assert not ran
    OnnxRuntime(artifacts).graph("audio_tokens")
    assert not ran
    shape = artifacts.contracts["audio_tokens"].shape(artifacts.contracts["audio_tokens"].inputs[0], 1)
    states = np.random.default_rng(0).standard_normal(shape, np.float32)
    first, second = (r.graph("audio_tokens").run({"states": states}) for r in (warm, OnnxRuntime(artifacts)))
    assert all(np.array_equal(first[name], second[name]) for name in first)
