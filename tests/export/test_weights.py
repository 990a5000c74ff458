"""External weights: shared by the graphs of a network, each tensor once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, external_data_helper, numpy_helper

from export.weights import ALIGNMENT, LEAST_BYTES, SharedWeights
from live_avatar.arrays import Array
from live_avatar.artifacts import Artifacts
from live_avatar.checkpoint import load_networks
from live_avatar.config import TINY


def model_of(**tensors: Array) -> onnx.ModelProto:
    """A graph that hands out its initializers."""
    initializers = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    outputs = [onnx.helper.make_tensor_value_info(f"{t.name}_out", t.data_type, t.dims) for t in initializers]
    nodes = [onnx.helper.make_node("Identity", [t.name], [f"{t.name}_out"]) for t in initializers]
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], outputs, initializers))


def places(model: onnx.ModelProto) -> Iterator[tuple[str, str, int, int]]:
    """Name, file, offset and length of every external tensor."""
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            info = external_data_helper.ExternalDataInfo(tensor)
            yield tensor.name, info.location, info.offset, info.length


def size_of(placed: set[tuple[int, int]]) -> int:
    return sum(length for _, length in placed)


def test_tensors_come_back_and_equal_ones_share_a_place(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    one, other = (draw.standard_normal((20, 30)).astype(np.float32) for _ in range(2))
    small = np.arange(3, dtype=np.int64)
    first, second = model_of(a=one, b=other, c=small), model_of(d=one.copy(), e=one.T.copy())
    with SharedWeights(tmp_path / "x.weights") as weights:
        for name, model in (("first", first), ("second", second)):
            weights.move(model)
            onnx.save(model, tmp_path / f"{name}.onnx")
    found = {name: place for model in (first, second) for name, *place in places(model)}
    assert set(found) == {"a", "b", "d", "e"}  # the small one stays inside
    assert found["a"] == found["d"] != found["b"]
    assert all(place[0] == "x.weights" and place[1] % ALIGNMENT == 0 for place in found.values())
    loaded = onnx.load(tmp_path / "first.onnx")
    back = {tensor.name: numpy_helper.to_array(tensor) for tensor in loaded.graph.initializer}
    for name, expected in (("a", one), ("b", other), ("c", small)):
        assert np.array_equal(back[name], expected)
    assert (tmp_path / "x.weights").stat().st_size == 2 * ALIGNMENT + one.nbytes  # a, b, and e


def test_the_steps_and_the_prefill_share_the_transformers_weights(artifacts: Artifacts) -> None:
    used = [
        {(offset, length) for _, file, offset, length in places(onnx.load(path, load_external_data=False))}
        for path in sorted(artifacts.folder.glob("dit_*.onnx"))
    ]
    assert len(used) == 5
    prefill, *steps = used
    shared = set.intersection(*steps)
    assert size_of(shared) > 0.95 * size_of(set.union(*steps))  # all but what is folded for each timestep
    assert size_of(shared & prefill) > 0.5 * size_of(shared)  # all but text, audio and head
    size = (artifacts.folder / "dit.weights").stat().st_size
    parameters = sum(parameter.numel() * 4 for parameter in load_networks(TINY).dit.parameters())
    assert size < 1.5 * parameters


def test_no_weight_is_stored_twice(artifacts: Artifacts) -> None:
    stored: dict[bytes, set[tuple[str, int]]] = {}
    for path in artifacts.folder.glob("*.onnx"):
        for name, file, offset, length in places(onnx.load(path, load_external_data=False)):
            assert length >= LEAST_BYTES, name
            data = (artifacts.folder / file).read_bytes()[offset : offset + length]
            assert len(data) == length, name
            stored.setdefault(hashlib.sha256(data).digest(), set()).add((file, offset))
    assert len(stored) > 100
    assert [where for where in stored.values() if len(where) > 1] == []


def test_no_graph_carries_large_weights_itself(artifacts: Artifacts) -> None:
    for path in artifacts.folder.glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        inside = [t for t in model.graph.initializer if t.data_location != TensorProto.EXTERNAL]
        large = [t.name for t in inside if numpy_helper.to_array(t).nbytes >= LEAST_BYTES]
        assert large == [], path.name


@pytest.mark.parametrize("file", ["dit.weights", "vae.weights", "speech_encoder.weights"])
def test_nothing_in_a_weights_file_is_unused(artifacts: Artifacts, file: str) -> None:
    used = {
        (offset, length)
        for path in artifacts.folder.glob("*.onnx")
        for _, location, offset, length in places(onnx.load(path, load_external_data=False))
        if location == file
    }
    end = 0
    for offset, length in sorted(used):
        assert 0 <= offset - end < ALIGNMENT
        end = offset + length
    assert end == (artifacts.folder / file).stat().st_size
