"""Networks out of a folder and out of a seed: every tensor accounted for, in the types of the preset."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from export.synthetic import official_preset, write_checkpoint
from live_avatar.assets import TINY_WEIGHTS
from live_avatar.config import NETWORK_NAMES, PRECISIONS, S2V_14B, TINY, TINY_DECODER
from live_avatar.errors import CheckpointError
from live_avatar.model.networks import Networks, meta_networks
from live_avatar.weights.checkpoint import load_networks, modulation_networks, open_checkpoint
from live_avatar.weights.tensors import shapes_of, validate_tensors

DRAWN = replace(TINY, weight_seed=TINY.weight_seed + 1)  # another seed than that whose place trained weights have
OTHER = replace(TINY, weight_seed=TINY.weight_seed + 100)
OFFICIAL = official_preset(TINY, {"layers": 1})
# Parameters of the transformer that have the type of the preset's precision.
LOW = re.compile(
    r"(text_embedding\.[02]|blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02])"
    r"|audio_injector\.(injector\.\d+\.[qkvo]|injector_adain_layers\.\d+\.linear))\.(weight|bias)"
)
# What is added to the network at a timestep.
MODULATION = re.compile(r"time_(embedding|projection)\.\d\.(weight|bias)|(head|blocks\.\d+)\.modulation")


def states(networks: Networks) -> dict[str, dict[str, Tensor]]:
    return {name: module.state_dict() for name, module in networks.parts().items()}


def same(one: Networks, other: Networks) -> bool:
    ours, theirs = states(one), states(other)
    assert [list(state) for state in ours.values()] == [list(state) for state in theirs.values()]
    return all(torch.equal(tensor, theirs[part][name]) for part in ours for name, tensor in ours[part].items())


def edited(path: Path, changes: dict[str, Tensor | None]) -> None:
    """Rewrites a file with tensors put in, or taken out where the change is None."""
    tensors = {name: changes.get(name, tensor) for name, tensor in {**load_file(path), **changes}.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def save(networks: Networks, folder: Path) -> None:
    """A checkpoint as `save_file` makes it; tied tensors are stored under each of their names."""
    for part, state in states(networks).items():
        save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, folder / f"{part}.safetensors")


def expected_type(part: str, name: str, precision: str) -> torch.dtype:
    """Norms, modulation, patches, head and everything of audio stay float32; UMT5 leaves the range of float16."""
    low = {
        "dit": LOW.fullmatch(name) is not None,
        "vae": True,
        "speech": False,
        "text": precision != "float16",
    }
    return getattr(torch, precision) if low[part] else torch.float32


@pytest.fixture(scope="module")
def drawn() -> Networks:
    return load_networks(open_checkpoint(DRAWN))


@pytest.fixture
def folder(drawn: Networks, tmp_path: Path) -> Path:
    save(drawn, tmp_path)
    return tmp_path


def test_saved_weights_come_back(drawn: Networks, folder: Path) -> None:
    assert not same(drawn, load_networks(open_checkpoint(OTHER)))
    assert same(drawn, load_networks(open_checkpoint(OTHER, folder)))


def test_weights_of_another_type_are_converted(drawn: Networks, folder: Path) -> None:
    for path in folder.iterdir():
        save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    exact = states(drawn)
    for part, module in load_networks(open_checkpoint(TINY, folder)).parts().items():
        for name, parameter in module.named_parameters():
            assert parameter.dtype == torch.float32, (part, name)
            assert torch.equal(parameter, exact[part][name].bfloat16().float()), (part, name)


def test_the_seed_alone_decides_the_weights(drawn: Networks) -> None:
    torch.manual_seed(1)
    assert same(drawn, load_networks(open_checkpoint(DRAWN)))


def test_without_a_preset_the_tiny_one_is_taken() -> None:
    assert open_checkpoint().preset == TINY


def test_opened_weights_are_those_of_the_networks(folder: Path) -> None:
    for checkpoint in (open_checkpoint(TINY), open_checkpoint(TINY, folder)):
        assert checkpoint.tokenizer is None
        for part, network in meta_networks(TINY).parts().items():
            validate_tensors(checkpoint.parts[part], shapes_of(network))


def test_networks_of_the_tiny_sizes_have_the_weights_of_the_package(drawn: Networks) -> None:
    shipped = load_networks(open_checkpoint(TINY, TINY_WEIGHTS))
    assert same(shipped, load_networks(open_checkpoint(TINY)))
    assert same(shipped, load_networks(open_checkpoint(TINY.with_stream(height=64, width=128))))
    assert not same(shipped, drawn)


def test_the_weights_of_the_package_are_small() -> None:
    files = list(TINY_WEIGHTS.glob("*.safetensors"))
    assert {file.stem for file in files} == {*NETWORK_NAMES, TINY_DECODER}
    assert sum(file.stat().st_size for file in files) < 20_000_000


def test_loaded_networks_do_not_train(drawn: Networks) -> None:
    for module in drawn.parts().values():
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_loaded_networks_are_alive_everywhere(drawn: Networks) -> None:
    for module in drawn.parts().values():
        assert not any(buffer.is_meta for buffer in module.buffers())
        for name, parameter in module.named_parameters():
            assert torch.isfinite(parameter).all(), name
            assert parameter.abs().max() > 0, name


# --- precision


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_parameter_has_its_documented_type(drawn: Networks, precision: str) -> None:
    networks = load_networks(open_checkpoint(DRAWN.with_precision(precision)))
    exact = states(drawn)
    for part, module in networks.parts().items():
        for name, parameter in module.named_parameters():
            expected = expected_type(part, name, precision)
            assert parameter.dtype == expected, (part, name)
            assert torch.equal(parameter, exact[part][name].to(expected)), (part, name)


def test_the_low_types_are_those_of_the_large_weights() -> None:
    """Of the released transformer, all but 2 % has the low type."""
    dit = meta_networks(S2V_14B.with_precision("bfloat16")).dit
    low = sum(parameter.numel() for parameter in dit.parameters() if parameter.dtype == torch.bfloat16)
    assert low / sum(parameter.numel() for parameter in dit.parameters()) == pytest.approx(0.981, abs=5e-4)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tied_weights_stay_tied(precision: str) -> None:
    checkpoint = open_checkpoint(TINY.with_precision(precision))
    for networks in (load_networks(checkpoint), modulation_networks(checkpoint)):
        assert networks.text.shared.weight is networks.text.encoder.embed_tokens.weight


# --- outlines


def test_an_outline_holds_what_modulation_is_made_of_and_no_more(drawn: Networks) -> None:
    networks = modulation_networks(open_checkpoint(DRAWN))
    for part, module in networks.parts().items():
        for name, parameter in module.named_parameters():
            real = part == "dit" and MODULATION.fullmatch(name) is not None
            assert parameter.is_meta != real, (part, name)
    for timestep in (0.0, 857.69232):
        ours, expected = networks.dit.modulation(timestep), drawn.dit.modulation(timestep)
        assert torch.equal(ours.layers, expected.layers)
        assert torch.equal(ours.head, expected.head)


def test_an_outline_needs_no_memory_for_the_released_model() -> None:
    networks = meta_networks(S2V_14B)
    assert sum(parameter.numel() for parameter in networks.dit.parameters()) == 16_295_755_609
    assert all(parameter.is_meta for module in networks.parts().values() for parameter in module.parameters())


# --- faults


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    message = f"checkpoint {tmp_path} has neither the official files (config.json and others) nor dit.safetensors;"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        open_checkpoint(TINY, tmp_path)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "vae.safetensors").unlink()
    message = (
        f"checkpoint file {folder / 'vae.safetensors'} does not exist; "
        "expected a folder with vae.safetensors in it, whole as downloaded."
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        open_checkpoint(TINY, folder)


@pytest.mark.parametrize(("name", "fault"), [("nowhere", "does not exist"), ("dit.safetensors", "is not a folder")])
def test_what_is_no_folder_is_named(folder: Path, name: str, fault: str) -> None:
    message = f"checkpoint {folder / name} {fault}; give the folder that holds the weights."
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        open_checkpoint(TINY, folder / name)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("dit", {"head.modulation": None}, "lacks 1 tensors, such as 'head.modulation'; is it of another preset?"),
        (
            "text",
            {"c.d": torch.zeros(1), "a.b": torch.zeros(1)},
            "has unknown 2 tensors, such as 'a.b'; is it of another preset?",
        ),
    ],
)
def test_missing_and_surplus_tensors_are_named(
    folder: Path, part: str, changes: dict[str, Tensor | None], message: str
) -> None:
    edited(folder / f"{part}.safetensors", changes)
    with pytest.raises(CheckpointError, match=f"^{re.escape(f'{folder}/{part}.safetensors {message}')}$"):
        open_checkpoint(TINY, folder)


def test_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    edited(folder / "dit.safetensors", {"head.modulation": torch.zeros(1, 2, 7)})
    message = "tensor 'head.modulation' has shape [1, 2, 7], expected [1, 2, 128]; is it of another preset?"
    with pytest.raises(CheckpointError, match=f"^{re.escape(f'{folder}/dit.safetensors: {message}')}$"):
        open_checkpoint(TINY, folder)


@pytest.mark.parametrize("kept", [0, 5, 5000, -1])
def test_half_a_file_is_named(folder: Path, kept: int) -> None:
    path = folder / "dit.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=rf"^{path} is not a whole safetensors file \(.+\); fetch it again\.$"):
        open_checkpoint(TINY, folder)


@pytest.mark.parametrize("own_files", [False, True])
def test_the_released_preset_without_its_download_is_refused(tmp_path: Path, own_files: bool) -> None:
    message = (
        "preset s2v-14b needs the official checkpoint and its tokenizer; give the folder with --checkpoint, or make "
        "one with random weights: python -m export.synthetic --help."
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        open_checkpoint(S2V_14B, tmp_path if own_files else None)


# --- the official folder (its files: test_official.py)


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("official") / "folder"
    write_checkpoint(OFFICIAL, folder, seed=None)
    return folder


def test_a_preset_of_the_same_networks_decides_the_stream(official: Path) -> None:
    wanted = replace(OFFICIAL, name="wanted").with_stream(height=64, width=64)
    opened = open_checkpoint(wanted, official)
    assert opened.preset == wanted
    assert opened.tokenizer is not None
    assert open_checkpoint(None, official).preset.dit == OFFICIAL.dit


@pytest.mark.parametrize(
    ("part", "field", "found", "value"),
    [("dit", "ffn_dim", 384, 392), ("vae", "dim", 8, 16), ("text", "tokenizer", "umt5", "bytes")],
)
def test_a_preset_of_other_networks_is_refused(
    official: Path, part: str, field: str, found: object, value: object
) -> None:
    wanted = replace(OFFICIAL, name="wanted", **{part: replace(getattr(OFFICIAL, part), **{field: value})})
    message = (
        f"{official} has {part} {field} {found}, but preset wanted has {value}; leave --preset out to take the sizes "
        "from the folder."
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        open_checkpoint(wanted, official)
