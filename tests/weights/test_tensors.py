"""Named tensors out of files and seeds, one at a time, and a sentence for what is wrong with a file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from live_avatar.errors import CheckpointError
from live_avatar.weights.tensors import (
    RandomWeights,
    RenamedWeights,
    SafetensorsWeights,
    TorchFileWeights,
    Weights,
    shapes_of,
    validate_tensors,
)

TENSORS = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "a.bias": torch.tensor([1.0, -2.0], dtype=torch.bfloat16),
    "b": torch.tensor(0.5, dtype=torch.float16),
}
SHAPES = {"a.weight": (2, 3), "a.bias": (2,), "b": ()}


def single(folder: Path) -> SafetensorsWeights:
    save_file(TENSORS, folder / "model.safetensors")
    return SafetensorsWeights(folder / "model.safetensors")


def index_of(placed: object) -> str:
    return json.dumps({"metadata": {"total_size": 30}, "weight_map": placed})


def sharded(folder: Path) -> SafetensorsWeights:
    """Two shards whose names sort against the order of the tensors."""
    placed = {"a.weight": "2.safetensors", "a.bias": "1.safetensors", "b": "2.safetensors"}
    for shard in set(placed.values()):
        save_file({name: TENSORS[name] for name, file in placed.items() if file == shard}, folder / shard)
    (folder / "index.json").write_text(index_of(placed))
    return SafetensorsWeights(folder / "index.json")


def torch_file(folder: Path) -> TorchFileWeights:
    torch.save(TENSORS, folder / "model.pth")
    return TorchFileWeights(folder / "model.pth")


def renamed(folder: Path) -> RenamedWeights:
    """Stored under other names, among a tensor that is not offered."""
    stored = {f"old.{name}": tensor for name, tensor in TENSORS.items()}
    save_file({**stored, "unused": torch.zeros(3)}, folder / "old.safetensors")
    return RenamedWeights(SafetensorsWeights(folder / "old.safetensors"), {name: f"old.{name}" for name in TENSORS})


@pytest.mark.parametrize(
    ("write", "origin", "files"),
    [
        (single, "model.safetensors", ["model.safetensors"]),
        (sharded, "index.json", ["index.json", "1.safetensors", "2.safetensors"]),
        (torch_file, "model.pth", ["model.pth"]),
        (renamed, "old.safetensors", ["old.safetensors"]),
    ],
)
def test_files_give_their_tensors_in_the_stored_type(
    tmp_path: Path, write: Callable[[Path], Weights], origin: str, files: list[str]
) -> None:
    weights = write(tmp_path)
    assert dict(weights.shapes()) == SHAPES
    assert weights.origin == str(tmp_path / origin)
    assert list(weights.files) == [tmp_path / file for file in files]
    for name, tensor in TENSORS.items():
        read = weights.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
        read.zero_()
        assert torch.equal(weights.read(name), tensor), "what is read is a copy of the file, not the file"


# --- safetensors


MAPPINGS = Path("/proc/self/maps")


@pytest.mark.skipif(not MAPPINGS.exists(), reason="only Linux lists what is mapped")
@pytest.mark.parametrize("write", [single, sharded])
def test_a_tensor_that_is_read_holds_no_mapping_of_its_file(
    tmp_path: Path, write: Callable[[Path], SafetensorsWeights]
) -> None:
    weights = write(tmp_path)
    read = weights.read("a.weight")
    assert str(tmp_path) not in MAPPINGS.read_text()
    assert torch.equal(read, TENSORS["a.weight"])


def test_the_free_text_of_a_header_is_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "with.safetensors", metadata={"alpha": "2"})
    assert SafetensorsWeights(tmp_path / "with.safetensors").metadata == {"alpha": "2"}
    assert single(tmp_path).metadata == {}


@pytest.mark.parametrize("make", [SafetensorsWeights, TorchFileWeights])
def test_a_missing_file_is_named(tmp_path: Path, make: type[SafetensorsWeights | TorchFileWeights]) -> None:
    message = (
        f"checkpoint file {tmp_path / 'file'} does not exist; expected a folder with file in it, whole as downloaded."
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        make(tmp_path / "file").shapes()


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_half_a_safetensors_file_is_named(tmp_path: Path, kept: int) -> None:
    path = single(tmp_path).files[0]
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(
        CheckpointError, match=rf"^{re.escape(str(path))} is not a whole safetensors file \(.+\); fetch"
    ):
        SafetensorsWeights(path).shapes()


DEEP = pytest.param('{"weight_map":' * 100_000, id="nested too deeply")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", "{}", '{"weight_map": 3}', '{"weight_map": ["a.weight"]}', "\udcff", DEEP]
)
def test_a_damaged_index_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "index.json"
    path.write_text(content, errors="surrogateescape")
    with pytest.raises(
        CheckpointError, match=rf"^{path} is not an index of safetensors files \(.+\); fetch it again\.$"
    ):
        SafetensorsWeights(path).shapes()


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    weights = sharded(tmp_path)
    (tmp_path / "2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"^checkpoint file {tmp_path}/2\.safetensors does not exist; expected"):
        weights.shapes()


def test_a_shard_that_lacks_a_tensor_is_named(tmp_path: Path) -> None:
    weights = sharded(tmp_path)
    save_file({"a.weight": TENSORS["a.weight"]}, tmp_path / "2.safetensors")
    message = f"{tmp_path}/2.safetensors lacks tensor 'b' of index.json; fetch both again."
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        weights.shapes()


@pytest.mark.parametrize("surplus", ["c", "b"])
def test_a_shard_with_a_tensor_that_the_index_does_not_place_there_is_named(tmp_path: Path, surplus: str) -> None:
    weights = sharded(tmp_path)
    save_file({"a.bias": TENSORS["a.bias"], surplus: torch.zeros(1)}, tmp_path / "1.safetensors")
    message = (
        f"{tmp_path}/1.safetensors has tensor {surplus!r}, which index.json does not place there; fetch both again."
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        weights.shapes()


# --- torch files


@pytest.mark.parametrize("kept", [0, 5, 100, -100])
def test_half_a_torch_file_is_named(tmp_path: Path, kept: int) -> None:
    path = torch_file(tmp_path).files[0]
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=rf"^{path} is not a whole torch file \(.+\); fetch it again\.$"):
        TorchFileWeights(path).shapes()


class Code:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_code_in_a_torch_file_is_refused_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"a": Code(tmp_path / "ran")}, path)
    message = f"{path} holds objects that are no tensors, and code is not run; fetch the official file."
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        TorchFileWeights(path).shapes()
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists(), "the file does hold code"


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"state_dict": TENSORS}, torch.zeros(1)])
def test_a_torch_file_without_a_state_dict_is_named(tmp_path: Path, content: object) -> None:
    path = tmp_path / "model.pth"
    torch.save(content, path)
    message = f"{path} holds no state dict, but {type(content).__name__}; fetch the official file."
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        TorchFileWeights(path).shapes()


# --- other names


def test_a_tensor_whose_stored_name_is_missing_is_not_offered(tmp_path: Path) -> None:
    weights = RenamedWeights(single(tmp_path), {"x": "a.bias", "y": "nowhere"})
    assert weights.shapes() == {"x": (2,)}


# --- seeds


def test_random_weights_are_a_function_of_name_and_seed() -> None:
    shapes = {"a": (3, 4), "b": (3, 4)}
    weights = RandomWeights(shapes, 5)
    first, second = weights.read("a"), weights.read("b")
    torch.manual_seed(1)
    torch.randn(1)
    again = RandomWeights(dict(reversed(shapes.items())), 5)
    assert torch.equal(again.read("b"), second)
    assert torch.equal(again.read("a"), first)
    assert not torch.equal(first, second)
    assert not torch.equal(RandomWeights(shapes, 6).read("a"), first)


def test_random_weights_say_their_seed_and_have_no_files() -> None:
    weights = RandomWeights({"a": (3, 4)}, 5)
    assert weights.origin == "random weights of seed 5"
    assert list(weights.files) == []
    assert weights.shapes() == {"a": (3, 4)}


@pytest.mark.parametrize(
    ("name", "shape", "mean", "deviation"),
    [
        ("ffn.0.weight", (200, 100), 0.0, 0.1),
        ("conv.weight", (500, 4, 5, 5), 0.0, 0.1),
        ("ffn.0.bias", (20_000,), 0.0, 0.1),
        ("norm_q.weight", (20_000,), 1.0, 0.1),
        ("residual.0.gamma", (20_000, 1, 1), 1.0, 0.1),
        ("parametrizations.weight.original0", (1, 1, 20_000), 1.0, 0.1),
        ("modulation", (1, 6, 4000), 0.0, 0.3),
    ],
)
def test_random_weights_keep_activations_of_size_one(
    name: str, shape: tuple[int, ...], mean: float, deviation: float
) -> None:
    drawn = RandomWeights({name: shape}, 5).read(name)
    assert drawn.mean().item() == pytest.approx(mean, abs=0.01)
    assert drawn.std().item() == pytest.approx(deviation, rel=0.05)


# --- accounting


class Unread:
    """Shapes of weights that cannot be read."""

    origin = "here"
    files: tuple[Path, ...] = ()

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str) -> Tensor:
        raise AssertionError(f"{name} was read")


def test_the_right_weights_are_accounted_for_in_any_order_without_reading() -> None:
    validate_tensors(Unread(dict(reversed(SHAPES.items()))), SHAPES)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"b": ()}, "here lacks 2 tensors, such as 'a.bias'; is it of another preset?"),
        ({**SHAPES, "d": (1,), "c": (1,)}, "here has unknown 2 tensors, such as 'c'; is it of another preset?"),
        (
            {**SHAPES, "a.weight": (3, 2)},
            "here: tensor 'a.weight' has shape [3, 2], expected [2, 3]; is it of another preset?",
        ),
        ({**SHAPES, "b": (1,)}, "here: tensor 'b' has shape [1], expected []; is it of another preset?"),
    ],
)
def test_a_fault_of_the_account_is_named(given: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        validate_tensors(Unread(given), SHAPES)


def test_shapes_of_a_network_without_memory() -> None:
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    assert shapes_of(network) == {"0.weight": (2, 3), "0.bias": (2,), "1.weight": (2,), "1.bias": (2,)}
