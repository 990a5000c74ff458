"""The official download: every tensor accounted for, renamed rightly, and a sentence for what is wrong."""

from __future__ import annotations

import json
import math
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from export.synthetic import lay_out, official_preset, write_checkpoint
from live_avatar.config import S2V_14B, TINY
from live_avatar.errors import CheckpointError
from live_avatar.weights.checkpoint import load_networks
from live_avatar.weights.official import (
    CONFIG_FILE,
    DIT_FILE,
    DIT_INDEX,
    SPEECH_FOLDER,
    TEXT_FILE,
    TOKENIZER_FILE,
    VAE_FILE,
    is_official,
    open_official,
)
from live_avatar.weights.tensors import SafetensorsWeights, Shapes, TorchFileWeights
from tests.support.released import released_parameters
from tests.tolerances import FLOAT32

GIB = 2**30
SPEECH_CONFIG = f"{SPEECH_FOLDER}/config.json"
SPEECH_FILE = f"{SPEECH_FOLDER}/model.safetensors"
PRESET = official_preset(TINY, {"layers": 1})
SHARD_BYTES = 2**20


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole small folder, in several shards; tests must not change it."""
    folder = tmp_path_factory.mktemp("official") / "folder"
    write_checkpoint(PRESET, folder, seed=1, shard_bytes=SHARD_BYTES)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(made, tmp_path / "folder")


def dit_shard(folder: Path) -> Path:
    return min(folder.glob("diffusion_pytorch_model-*.safetensors"))


def parameters(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


# --- the released model


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every file of the true 14B shapes, 43 GiB of zeros that take no room."""
    folder = tmp_path_factory.mktemp("released")
    lay_out(S2V_14B, folder, shard_bytes=9 * GIB)
    return folder


def test_the_released_shapes_are_opened_as_s2v_14b_and_nothing_is_read(released: Path) -> None:
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    checkpoint = open_official(released)
    assert checkpoint.preset == S2V_14B
    assert checkpoint.tokenizer == released / TOKENIZER_FILE
    assert {part: len(weights.shapes()) for part, weights in checkpoint.parts.items()} == {
        "dit": 1260, "vae": 194, "speech": 422, "text": 243,
    }  # fmt: skip
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 256 * 1024


def test_the_laid_out_files_have_the_released_names_and_shapes(released: Path) -> None:
    """So that the test above is one of the released files, as far as the specification lists them."""
    dit = SafetensorsWeights(released / DIT_INDEX)
    assert dict(dit.shapes()) == released_parameters("dit")
    assert parameters(dit.shapes()) == 16_295_755_609
    assert len(dit.files) == 1 + 4
    vae = TorchFileWeights(released / VAE_FILE).shapes()
    assert dict(vae) == released_parameters("vae")
    assert parameters(vae) == 126_892_531


def umt5_shapes(layers: int, width: int, inner: int, hidden: int, heads: int, vocabulary: int) -> Shapes:
    """The state dict of the Wan repository's encoder."""
    shapes: dict[str, tuple[int, ...]] = {"token_embedding.weight": (vocabulary, width), "norm.weight": (width,)}
    for i in range(layers):
        shapes |= {f"blocks.{i}.norm{n}.weight": (width,) for n in (1, 2)}
        shapes |= {f"blocks.{i}.attn.{name}.weight": (inner, width) for name in "qkv"}
        shapes[f"blocks.{i}.attn.o.weight"] = (width, inner)
        shapes[f"blocks.{i}.ffn.gate.0.weight"] = shapes[f"blocks.{i}.ffn.fc1.weight"] = (hidden, width)
        shapes[f"blocks.{i}.ffn.fc2.weight"] = (width, hidden)
        shapes[f"blocks.{i}.pos_embedding.embedding.weight"] = (32, heads)
    return shapes


def test_umt5_has_the_names_of_the_wan_repository(released: Path) -> None:
    shapes = TorchFileWeights(released / TEXT_FILE).shapes()
    assert dict(shapes) == umt5_shapes(24, 4096, 4096, 10_240, 64, 256_384)
    assert len(shapes) == 242
    assert parameters(shapes) == 5_680_910_336


def test_wav2vec2_is_the_class_of_transformers_with_a_head(released: Path) -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    config = Wav2Vec2Config(**json.loads((released / SPEECH_CONFIG).read_text()))
    with torch.device("meta"):
        state = Wav2Vec2ForCTC(config).state_dict()
    renamed = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): tuple(tensor.shape)
        for name, tensor in state.items()
    }
    assert dict(SafetensorsWeights(released / SPEECH_FILE).shapes()) == renamed
    assert len(renamed) == 424
    assert parameters(renamed) == 315_472_545


# --- names and values


def wan_umt5(weights: dict[str, Tensor], ids: Tensor, mask: Tensor, heads: int) -> Tensor:
    """The encoder of the Wan repository, written from its description: ids [L], mask [L] -> [L, width]."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weights[f"{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T

    def attend(x: Tensor, block: str) -> Tensor:
        query, key, value = (linear(x, f"{block}.attn.{n}").unflatten(1, (heads, -1)).transpose(0, 1) for n in "qkv")
        bias = weights[f"{block}.pos_embedding.embedding.weight"][buckets].permute(2, 0, 1)
        scores = query @ key.transpose(1, 2) + bias  # not scaled by the head's width
        attention = scores.masked_fill(mask == 0, -torch.inf).softmax(-1)
        return linear((attention @ value).transpose(0, 1).flatten(1), f"{block}.attn.o")

    def feed_forward(x: Tensor, block: str) -> Tensor:
        gate = F.gelu(linear(x, f"{block}.ffn.gate.0"), approximate="tanh")
        return linear(linear(x, f"{block}.ffn.fc1") * gate, f"{block}.ffn.fc2")

    buckets = torch.tensor([[bucket(key - query) for key in range(len(ids))] for query in range(len(ids))])
    x = weights["token_embedding.weight"][ids]
    layers = sum(name.endswith("norm1.weight") for name in weights)
    for i in range(layers):
        x = x + attend(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}")
        x = x + feed_forward(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}")
    return norm(x, "norm")


def bucket(distance: int) -> int:
    """T5's relative position bucket of 32: 16 for the past, 16 for the future, exact below 8, logarithmic to 128."""
    future, distance = 16 * (distance > 0), abs(distance)
    if distance < 8:
        return future + distance
    return future + min(15, 8 + int(math.log(distance / 8) / math.log(128 / 8) * 8))


def test_umt5_under_its_new_names_computes_what_the_wan_encoder_does(folder: Path) -> None:
    text, length, valid = PRESET.text, 150, 140
    shapes = umt5_shapes(
        text.num_layers, text.d_model, text.num_heads * text.d_kv, text.d_ff, text.num_heads, text.vocab_size
    )
    generator = torch.Generator().manual_seed(5)
    weights = {
        name: torch.randn(shape, generator=generator) * (1 if len(shape) == 1 else 0.5 * shape[1] ** -0.5)
        for name, shape in shapes.items()
    }
    torch.save(weights, folder / TEXT_FILE)
    ids = torch.randint(0, text.vocab_size, (length,), generator=generator)
    mask = (torch.arange(length) < valid).long()
    network = load_networks(open_official(folder)).text
    ours = network(input_ids=ids[None], attention_mask=mask[None]).last_hidden_state[0]
    expected = wan_umt5(weights, ids, mask, text.num_heads)
    tolerance = FLOAT32 * float(expected.abs().max())
    torch.testing.assert_close(ours[:valid], expected[:valid], rtol=0, atol=tolerance)


def test_the_speech_encoder_computes_what_transformers_loads_from_the_folder(made: Path) -> None:
    from transformers import Wav2Vec2ForCTC

    theirs = Wav2Vec2ForCTC.from_pretrained(made / SPEECH_FOLDER).eval()
    ours = load_networks(open_official(made)).speech
    samples = torch.randn(1, 8000, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs(samples, output_hidden_states=True).hidden_states
        states = ours(samples, output_hidden_states=True).hidden_states
    assert len(states) == PRESET.speech.num_hidden_layers + 1
    for state, other in zip(states, expected, strict=True):
        torch.testing.assert_close(state, other, rtol=0, atol=FLOAT32)


def test_the_preset_is_read_from_the_files(made: Path) -> None:
    found = open_official(made).preset
    assert found == replace(PRESET, name="custom", stream=S2V_14B.stream)


@pytest.mark.parametrize("newer_names", [False, True], ids=["weight_g", "parametrizations"])
def test_the_older_file_of_wav2vec2_is_read(made: Path, folder: Path, newer_names: bool) -> None:
    stored = load_file(folder / SPEECH_FILE)
    if newer_names:
        for number, old in enumerate(("weight_g", "weight_v")):
            name = f"wav2vec2.encoder.pos_conv_embed.conv.{old}"
            stored[name.replace(old, f"parametrizations.weight.original{number}")] = stored.pop(name)
    torch.save(stored, folder / SPEECH_FOLDER / "pytorch_model.bin")
    (folder / SPEECH_FILE).unlink()
    ours, expected = open_official(folder).parts["speech"], open_official(made).parts["speech"]
    assert ours.shapes() == expected.shapes()
    assert all(torch.equal(ours.read(name), expected.read(name)) for name in expected.shapes())


def test_one_unsharded_file_is_read(made: Path, folder: Path) -> None:
    expected = open_official(made).parts["dit"]
    save_file({name: expected.read(name) for name in expected.shapes()}, folder / DIT_FILE)
    (folder / DIT_INDEX).unlink()
    ours = open_official(folder).parts["dit"]
    assert list(ours.files) == [folder / DIT_FILE]
    assert torch.equal(ours.read("head.modulation"), expected.read("head.modulation"))


def test_the_folder_is_recognised_by_any_of_its_files(folder: Path, tmp_path: Path) -> None:
    assert not is_official(tmp_path / "nowhere")
    assert is_official(folder)
    for name in (CONFIG_FILE, DIT_INDEX, VAE_FILE):
        (folder / name).unlink()
    assert is_official(folder)
    (folder / TEXT_FILE).unlink()
    assert not is_official(folder)


# --- what is wrong is named


def change_dit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    weights = SafetensorsWeights(folder / DIT_INDEX)
    tensors = {name: weights.read(name) for name in weights.shapes()}
    change(tensors)
    save_file(tensors, folder / DIT_FILE)
    (folder / DIT_INDEX).unlink()


def change_speech(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / SPEECH_FILE)
    change(tensors)
    save_file(tensors, folder / SPEECH_FILE)


def change_torch_file(name: str) -> Callable[[Path, Callable[[dict[str, Tensor]], None]], None]:
    def change_file(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
        tensors = dict(torch.load(folder / name))
        change(tensors)
        torch.save(tensors, folder / name)

    return change_file


PARTS = pytest.mark.parametrize(
    ("change", "file", "name", "shape"),
    [
        (change_dit, "diffusion_pytorch_model", "head.modulation", r"\[1, 2, 128\]"),
        (change_torch_file(VAE_FILE), "Wan2.1_VAE.pth", "decoder.head.2.bias", r"\[3\]"),
        (change_torch_file(TEXT_FILE), "models_t5_umt5-xxl-enc-bf16.pth", "blocks.1.attn.k.weight", r"\[64, 64\]"),
        (change_speech, "model.safetensors", "wav2vec2.encoder.pos_conv_embed.conv.weight_v", r"\[48, 12, 16\]"),
    ],
    ids=["dit", "vae", "text", "speech"],
)


@PARTS
def test_a_missing_tensor_is_named(folder: Path, change: Any, file: str, name: str, shape: str) -> None:
    change(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=rf"{file}.* lacks 1 tensors, such as '{name}'; is it of another"):
        open_official(folder)


@PARTS
def test_a_surplus_tensor_is_named(folder: Path, change: Any, file: str, name: str, shape: str) -> None:
    change(folder, lambda tensors: tensors.update({f"{name}_2": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=rf"{file}.* has unknown 1 tensors, such as '{name}_2'; is it of another"):
        open_official(folder)


@PARTS
def test_a_tensor_of_another_shape_is_named(folder: Path, change: Any, file: str, name: str, shape: str) -> None:
    change(folder, lambda tensors: tensors.update({name: torch.zeros(7)}))
    with pytest.raises(
        CheckpointError, match=rf"{file}.*: tensor '{name}' has shape \[7\], expected {shape}; is it of"
    ):
        open_official(folder)


@pytest.mark.parametrize(
    ("file", "name"),
    [(TEXT_FILE, "token_embedding.weight"), (TEXT_FILE, "blocks.0.attn.q.weight"), (VAE_FILE, "encoder.conv1.weight")],
)
def test_a_tensor_that_tells_a_size_is_named(folder: Path, file: str, name: str) -> None:
    change_torch_file(file)(folder, lambda tensors: tensors.update({name: torch.zeros(7)}))
    with pytest.raises(CheckpointError, match=rf"tensor '{name}' has shape \[7\], expected one of . dimensions; fetch"):
        open_official(folder)
    change_torch_file(file)(folder, lambda tensors: tensors.pop(name) is None)
    with pytest.raises(CheckpointError, match=rf"tensor '{name}' is missing, expected one of . dimensions; fetch"):
        open_official(folder)


def test_another_number_of_position_buckets_is_refused(folder: Path) -> None:
    name = "blocks.0.pos_embedding.embedding.weight"
    change_torch_file(TEXT_FILE)(folder, lambda tensors: tensors.update({name: torch.zeros(64, 4)}))
    with pytest.raises(CheckpointError, match=r"has 64 relative position buckets, but only 32 are supported; fetch"):
        open_official(folder)


ABSENT = object()


def change_settings(path: Path, changes: dict[str, Any]) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ABSENT}))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (CONFIG_FILE, {"model_type": "t2v"}, r"config\.json: model_type is 't2v', but only 's2v' is supported; fetch"),
        (CONFIG_FILE, {"patch_size": [1, 4, 4]}, r"patch_size is \[1, 4, 4\], but only \[1, 2, 2\] is supported"),
        (CONFIG_FILE, {"cond_dim": 0}, r"cond_dim is 0, but only 16 is supported"),
        (CONFIG_FILE, {"enable_adain": False}, r"enable_adain is False, but only True is supported"),
        (CONFIG_FILE, {"enable_adain": 1}, r"enable_adain is 1, but only True is supported"),
        (CONFIG_FILE, {"adain_mode": "block"}, r"adain_mode is 'block', but only 'attn_norm' is supported"),
        (CONFIG_FILE, {"zero_timestep": False}, r"zero_timestep is False, but only True is supported"),
        (CONFIG_FILE, {"zero_timestep": ABSENT}, r"config\.json lacks key 'zero_timestep'; fetch the official file"),
        (CONFIG_FILE, {"framepack_drop_mode": "drop"}, r"framepack_drop_mode is 'drop', but only 'padd' is supported"),
        (CONFIG_FILE, {"enable_motioner": True}, r"enable_motioner is True, but only False is supported"),
        (CONFIG_FILE, {"enable_tsm": True}, r"enable_tsm is True, but only False is supported"),
        (CONFIG_FILE, {"qk_norm": False}, r"qk_norm is False, but only True is supported"),
        (CONFIG_FILE, {"cross_attn_norm": False}, r"cross_attn_norm is False, but only True is supported"),
        (CONFIG_FILE, {"window_size": [8, 8]}, r"window_size is \[8, 8\], but only \[-1, -1\] is supported"),
        (CONFIG_FILE, {"eps": 1e-5}, r"eps is 1e-05, but only 1e-06 is supported"),
        (CONFIG_FILE, {"num_layer": 40}, r"config\.json has unknown key 'num_layer'; expected the constructor's"),
        (CONFIG_FILE, {"num_layers": ABSENT}, r"config\.json lacks key 'num_layers'; fetch the official file"),
        (CONFIG_FILE, {"dim": "128"}, r"dim has '128', expected a whole number of at least 1; mend it"),
        (CONFIG_FILE, {"num_heads": True}, r"num_heads has True, expected a whole number of at least 1"),
        (CONFIG_FILE, {"num_heads": 5}, r"do not fit together: dim 128 is not a multiple of 5 heads; change one"),
        (CONFIG_FILE, {"audio_inject_layers": 4}, r"audio_inject_layers is 4, expected a list of whole numbers"),
        (CONFIG_FILE, {"audio_inject_layers": [-1]}, r"audio_inject_layers has -1, expected .* of at least 0"),
        (CONFIG_FILE, {"audio_dim": 64}, r"do not fit together: the DiT takes 5 speech states of width 64;"),
        (CONFIG_FILE, {"text_dim": 32}, r"do not fit together: the DiT takes text of width 32;"),
        (CONFIG_FILE, {"ffn_dim": 400}, r"tensor 'blocks\.0\.ffn\.0\.weight' has shape \[384, 128\], expected \[400"),
        (SPEECH_CONFIG, {"do_stable_layer_norm": ABSENT}, r"lacks key 'do_stable_layer_norm'; fetch the official"),
        (SPEECH_CONFIG, {"feat_extract_norm": "group"}, r"feat_extract_norm is 'group', but only 'layer' is supported"),
        (SPEECH_CONFIG, {"conv_bias": False}, r"conv_bias is False, but only True is supported"),
        (SPEECH_CONFIG, {"hidden_size": ABSENT}, r"config\.json lacks key 'hidden_size'; fetch the official file"),
        (SPEECH_CONFIG, {"conv_stride": [5, 0]}, r"conv_stride has 0, expected a whole number of at least 1"),
        (SPEECH_CONFIG, {"num_attention_heads": 7}, r"make no network \(.*48.*7.*\); fetch the official files"),
    ],
)  # fmt: skip
def test_a_setting_that_is_not_supported_is_named(
    folder: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    change_settings(folder / file, changes)
    with pytest.raises(CheckpointError, match=message):
        open_official(folder)


def test_settings_that_change_nothing_are_accepted(folder: Path) -> None:
    """The constructor's arguments in full, as the specification lists them, and what diffusers adds."""
    full = {
        "cross_attn_type": "t2v_cross_attn", "zero_init": True, "add_last_motion": True, "patch_size": [1, 2, 2],
        "trainable_token_pos_emb": False, "motion_token_num": 1024, "text_dim": 64, "window_size": [-1, -1],
        "qk_norm": True, "cross_attn_norm": True, "_class_name": "WanModel_S2V", "_diffusers_version": "0.35",
    }  # fmt: skip
    change_settings(folder / CONFIG_FILE, full)
    assert open_official(folder).preset.dit == PRESET.dit


@pytest.mark.parametrize("file", [CONFIG_FILE, VAE_FILE, TEXT_FILE, TOKENIZER_FILE, SPEECH_CONFIG, SPEECH_FILE])
def test_a_missing_file_is_named(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=rf"file .*{Path(file).name} does not exist; expected "):
        open_official(folder)


def test_a_missing_transformer_is_named(folder: Path) -> None:
    (folder / DIT_INDEX).unlink()
    with pytest.raises(CheckpointError, match=rf"file .*{DIT_FILE} does not exist; expected "):
        open_official(folder)


@pytest.mark.parametrize("file", [CONFIG_FILE, SPEECH_CONFIG])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a JSON file"),
        ("[1]", "holds list, expected an object of settings"),
        pytest.param("[" * 100_000, r"is not a JSON file \(it is nested too deeply\)", id="nested too deeply"),
    ],
)
def test_damaged_settings_are_named(folder: Path, file: str, content: str, message: str) -> None:
    (folder / file).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{file} {message}.*; fetch it again\."):
        open_official(folder)


@pytest.mark.parametrize("file", [VAE_FILE, TEXT_FILE])
@pytest.mark.parametrize("kept", [0, 1000, 100_000])
def test_half_a_torch_file_is_named(folder: Path, file: str, kept: int) -> None:
    (folder / file).write_bytes((folder / file).read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=rf"{file} is not a whole torch file \(.*\); fetch it again\."):
        open_official(folder)


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": [1]}'])
def test_a_damaged_index_is_named(folder: Path, content: str) -> None:
    (folder / DIT_INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{DIT_INDEX} is not an index of safetensors files \(.*\); fetch it"):
        open_official(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard = dit_shard(folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"file .*{shard.name} does not exist; expected a folder with"):
        open_official(folder)


def test_a_shard_that_lacks_a_tensor_of_the_index_is_named(folder: Path) -> None:
    shard = dit_shard(folder)
    tensors = load_file(shard)
    lost = next(iter(tensors))
    del tensors[lost]
    save_file(tensors, shard)
    with pytest.raises(CheckpointError, match=rf"{shard.name} lacks tensor '{lost}' of {DIT_INDEX}; fetch both again"):
        open_official(folder)


def test_half_a_shard_is_named(folder: Path) -> None:
    shard = dit_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{shard.name} is not a whole safetensors file \(.*\); fetch it again"):
        open_official(folder)


def test_a_damaged_tokenizer_is_named(folder: Path) -> None:
    (folder / TOKENIZER_FILE).write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a whole tokenizer\.json \(.*\); fetch it again"):
        open_official(folder)
