"""External weights: shared by the graphs of a network, each tensor once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, external_data_helper, numpy_helper

from live_avatar.config import TINY
from live_avatar.exporter.build import LEAST_BYTES
from live_avatar.exporter.weight_file import ALIGNMENT, WeightFile, tensor_bytes
from live_avatar.graphs.artifacts import Artifacts, weight_file
from live_avatar.weights.checkpoint import load_networks, open_checkpoint

SHAPES = {"flat": (24,), "wide": (4, 6)}


def value(name: str, *shape: int, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    """An initializer without a value."""
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def places(model: onnx.ModelProto) -> Iterator[tuple[str, str, int, int]]:
    """Name, file, offset and length of every external tensor."""
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            info = external_data_helper.ExternalDataInfo(tensor)
            yield tensor.name, info.location, info.offset, info.length


def test_tensors_come_back_and_one_name_is_read_and_written_once(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    stored = {name: torch.randn(20, 30, generator=draw) for name in ("a", "b")}
    read = []

    def reader(name: str) -> memoryview:
        read.append(name)
        return tensor_bytes(stored[name])

    with WeightFile(tmp_path / "x.weights") as weights:
        places = [weights.place(name, value(name, 20, 30), partial(reader, name)) for name in "aba"]
    assert read == ["a", "b"]
    assert (places[0].offset, places[0].length) == (places[2].offset, places[2].length)
    assert [(place.location, place.offset, place.length) for place in places[:2]] == [
        ("x.weights", 0, 2400),
        ("x.weights", ALIGNMENT, 2400),
    ]
    for place, name in zip(places, "aba", strict=True):
        assert np.array_equal(place.numpy(), stored[name].numpy())
    assert (tmp_path / "x.weights").stat().st_size == ALIGNMENT + 2400


def test_tensors_of_the_same_bytes_keep_their_shapes(tmp_path: Path) -> None:
    """Zeros of two shapes stand in the file once."""
    with WeightFile(tmp_path / "x.weights") as weights:
        places = [weights.place("zeros", value(name, *shape), lambda: bytes(96)) for name, shape in SHAPES.items()]
    assert [tuple(place.shape) for place in places] == list(SHAPES.values())
    assert [place.name for place in places] == list(SHAPES)
    assert {(place.offset, place.length) for place in places} == {(0, 96)}
    assert (tmp_path / "x.weights").stat().st_size == 96


def test_bfloat16_is_stored_as_it_is(tmp_path: Path) -> None:
    stored = torch.tensor([[1.0, -2.5], [1e-30, 3e38]], dtype=torch.bfloat16).t()  # not contiguous
    with WeightFile(tmp_path / "x.weights") as weights:
        place = weights.place("w", value("w", 2, 2, dtype=ir.DataType.BFLOAT16), lambda: tensor_bytes(stored))
    assert place.length == 8
    assert np.array_equal(place.numpy().astype(np.float32), stored.float().numpy())


def test_the_transformers_weights_stand_once(artifacts: Artifacts) -> None:
    """All but those of the audio encoder, which are beside it, and of the modulation, which is computed at export."""
    dit = load_networks(open_checkpoint(TINY)).dit
    elsewhere = ("casual_audio_encoder", "time_embedding", "time_projection", "modulation")
    parameters = sum(
        parameter.numel() * 4
        for name, parameter in dit.named_parameters()
        if not any(part in name.split(".") for part in elsewhere)
    )
    size = (artifacts.folder / "dit.weights").stat().st_size
    assert size == pytest.approx(parameters, rel=0.1)  # tensors begin at pages


def test_no_weight_is_stored_twice(artifacts: Artifacts) -> None:
    stored: dict[bytes, set[tuple[str, int]]] = {}
    for path in artifacts.folder.glob("*.onnx"):
        for name, file, offset, length in places(onnx.load(path, load_external_data=False)):
            data = (artifacts.folder / file).read_bytes()[offset : offset + length]
            assert len(data) == length, name
            stored.setdefault(hashlib.sha256(data).digest(), set()).add((file, offset))
    assert len(stored) > 100
    assert [where for where in stored.values() if len(where) > 1] == []


@pytest.mark.parametrize(("component", "part"), [("dit", "dit"), ("vae_decoder", "vae"), ("speech_encoder", "speech")])
def test_weights_are_called_as_in_the_checkpoint(artifacts: Artifacts, component: str, part: str) -> None:
    weights = open_checkpoint(TINY).parts[part]
    model = onnx.load(artifacts.graph_path(component), load_external_data=False)
    stored = {name: place for name, *place in places(model)}
    named = [name for name in weights.shapes() if f"{part}.{name}" in stored]
    assert len(named) > 15
    data = artifacts.folder.joinpath(weight_file(component)).read_bytes()
    for name in named:
        file, offset, length = stored[f"{part}.{name}"]
        assert file == weight_file(component)
        assert data[offset : offset + length] == bytes(tensor_bytes(weights.read(name))), name


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
