"""Adapters: keys, shapes, rank and alpha checked when opened; merged in float32 and rounded once when read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from export.synthetic import write_lora
from live_avatar.config import TINY
from live_avatar.errors import CheckpointError
from live_avatar.weights.checkpoint import load_networks, open_checkpoint
from live_avatar.weights.lora import LoRA, MergedWeights
from live_avatar.weights.tensors import RandomWeights, SafetensorsWeights
from tests.tolerances import FLOAT32

PREFIX = "base_model.model."
QUERY = "blocks.0.self_attn.q"
FFN = "blocks.0.ffn.2"
INJECTOR = "audio_injector.injector.0.o"
SHAPES = {
    f"{QUERY}.weight": (6, 6),
    f"{QUERY}.bias": (6,),
    f"{FFN}.weight": (6, 8),
    f"{INJECTOR}.weight": (6, 6),
    "audio_injector.injector_adain_layers.0.linear.weight": (12, 6),
    "head.head.weight": (4, 6),
}
BASE = RandomWeights(SHAPES, 1)
RANK = 2
ALPHA = {"lora_alpha": "3.0"}
A, B = f"{PREFIX}{QUERY}.lora_A.default.weight", f"{PREFIX}{QUERY}.lora_B.default.weight"


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def factors(module: str, rank: int = RANK) -> dict[str, Tensor]:
    out_features, in_features = SHAPES[f"{module}.weight"]
    return {
        f"{PREFIX}{module}.lora_A.default.weight": drawn(rank, in_features),
        f"{PREFIX}{module}.lora_B.default.weight": drawn(out_features, rank),
    }


def adapter(folder: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None, **given: Any) -> LoRA:
    save_file(dict(tensors), folder / "lora.safetensors", metadata=metadata)
    return LoRA(folder / "lora.safetensors", **given)


def refused(lora: LoRA, message: str, base: RandomWeights = BASE) -> None:
    """The adapter is refused when it is opened; the sentence begins with its file."""
    with pytest.raises(CheckpointError, match=f"^{re.escape(f'{lora.path}{message}')}$"):
        MergedWeights(base, lora)


# --- merging


def test_the_product_is_added_to_its_layers_and_nothing_else_changes(tmp_path: Path) -> None:
    tensors = {**factors(QUERY), **factors(FFN), **factors(INJECTOR)}
    merged = MergedWeights(BASE, adapter(tmp_path, tensors, ALPHA))
    assert merged.merged == sorted(f"{module}.weight" for module in (QUERY, FFN, INJECTOR))
    assert merged.shapes() == SHAPES
    for name in SHAPES:
        expected = BASE.read(name).double()
        if name in merged.merged:
            down, up = factors(name.removesuffix(".weight")).values()
            expected += 3.0 / RANK * up.double() @ down.double()
        read = merged.read(name)
        assert read.dtype == torch.float32
        assert (read.double() - expected).abs().max() < FLOAT32, name
        assert torch.equal(read, BASE.read(name)) == (name not in merged.merged)


def test_it_says_where_it_comes_from(tmp_path: Path) -> None:
    save_file({name: BASE.read(name) for name in SHAPES}, tmp_path / "base.safetensors")
    lora = adapter(tmp_path, factors(QUERY), ALPHA)
    merged = MergedWeights(SafetensorsWeights(tmp_path / "base.safetensors"), lora)
    assert merged.origin == f"{tmp_path}/base.safetensors with {lora.path}"
    assert list(merged.files) == [tmp_path / "base.safetensors", lora.path]


def test_the_base_is_left_as_it_is(tmp_path: Path) -> None:
    save_file({name: BASE.read(name) for name in SHAPES}, tmp_path / "base.safetensors")
    base = SafetensorsWeights(tmp_path / "base.safetensors")
    merged = MergedWeights(base, adapter(tmp_path, factors(QUERY), ALPHA))
    first = merged.read(f"{QUERY}.weight")
    assert torch.equal(merged.read(f"{QUERY}.weight"), first)
    assert torch.equal(base.read(f"{QUERY}.weight"), BASE.read(f"{QUERY}.weight"))


def low_base(folder: Path, value: float) -> SafetensorsWeights:
    """A base of bfloat16 whose one query weight is all `value`."""
    save_file({f"{QUERY}.weight": torch.full((6, 6), value).bfloat16()}, folder / "base.safetensors")
    return SafetensorsWeights(folder / "base.safetensors")


def test_the_sum_is_rounded_once(tmp_path: Path) -> None:
    """bfloat16 above 1 goes in steps of 2^-7: the sum lies just over the middle, the rounded product just on it."""
    tensors = {A: torch.ones(2, 6), B: torch.tensor([2.0**-8, 2.0**-17]).repeat(6, 1)}
    product = tensors[B] @ tensors[A]
    base = low_base(tmp_path, 1.0)
    one = base.read(f"{QUERY}.weight")
    read = MergedWeights(base, adapter(tmp_path, tensors, alpha=2.0)).read(f"{QUERY}.weight")
    assert read.dtype == torch.bfloat16
    assert torch.equal(read, (one.float() + product).bfloat16())
    assert torch.equal(read, torch.full((6, 6), 1 + 2.0**-7).bfloat16())
    assert torch.equal(one + product.bfloat16(), one), "rounded twice, the adapter would be lost"


def test_a_full_weight_in_the_file_is_rounded_only_after_the_product(tmp_path: Path) -> None:
    full = torch.full((6, 6), 1 + 2.0**-9)
    tensors = {A: torch.ones(2, 6), B: torch.tensor([2.0**-9, 2.0**-17]).repeat(6, 1)}
    lora = adapter(tmp_path, {**tensors, f"{PREFIX}{QUERY}.base_layer.weight": full}, alpha=2.0)
    read = MergedWeights(low_base(tmp_path, 5.0), lora).read(f"{QUERY}.weight")
    assert torch.equal(read, torch.full((6, 6), 1 + 2.0**-7).bfloat16())
    assert torch.equal((full.bfloat16().float() + tensors[B] @ tensors[A]).bfloat16(), torch.ones(6, 6).bfloat16())


def test_factors_of_16_bits_are_multiplied_in_float32(tmp_path: Path) -> None:
    low = {key: tensor.bfloat16() for key, tensor in factors(QUERY).items()}
    read = MergedWeights(BASE, adapter(tmp_path, low, ALPHA)).read(f"{QUERY}.weight")
    wide = {key: tensor.float() for key, tensor in low.items()}
    assert torch.equal(read, MergedWeights(BASE, adapter(tmp_path, wide, ALPHA)).read(f"{QUERY}.weight"))


@pytest.mark.parametrize("prefix", [PREFIX, ""])
def test_full_weights_in_the_file_replace_those_of_the_network(tmp_path: Path, prefix: str) -> None:
    weight, bias, head = drawn(6, 6), drawn(6), drawn(4, 6)
    tensors = {
        **{key.replace(PREFIX, prefix): tensor for key, tensor in factors(QUERY).items()},
        f"{prefix}{QUERY}.base_layer.weight": weight,
        f"{prefix}{QUERY}.base_layer.bias": bias,
        f"{prefix}head.head.weight": head,
    }
    merged = MergedWeights(BASE, adapter(tmp_path, tensors, ALPHA))
    assert merged.merged == sorted([f"{QUERY}.weight", f"{QUERY}.bias", "head.head.weight"])
    down, up = factors(QUERY).values()
    assert (merged.read(f"{QUERY}.weight") - (weight + 1.5 * up @ down)).abs().max() < FLOAT32
    assert torch.equal(merged.read(f"{QUERY}.bias"), bias)
    assert torch.equal(merged.read("head.head.weight"), head)
    assert torch.equal(merged.read(f"{FFN}.weight"), BASE.read(f"{FFN}.weight"))


def test_a_file_of_full_weights_needs_no_alpha(tmp_path: Path) -> None:
    head = drawn(4, 6)
    merged = MergedWeights(BASE, adapter(tmp_path, {"head.head.weight": head}))
    assert merged.merged == ["head.head.weight"]
    assert torch.equal(merged.read("head.head.weight"), head)


def test_an_opened_checkpoint_has_the_adapter_in_its_transformer(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    write_lora(TINY, path, seed=4, rank=RANK)
    plain = load_networks(open_checkpoint(TINY))
    checkpoint = open_checkpoint(TINY, None, LoRA(path))
    adapted = load_networks(checkpoint)
    target = re.compile(r"(blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02])|audio_injector\.injector\.\d+\.[qkvo])")
    for part, module in plain.parts().items():
        theirs = adapted.parts()[part].state_dict()
        for name, tensor in module.state_dict().items():
            expected = part == "dit" and name.endswith(".weight") and target.fullmatch(name[: -len(".weight")])
            assert torch.equal(tensor, theirs[name]) != bool(expected), (part, name)


# --- alpha and rank


def test_alpha_of_the_header(tmp_path: Path) -> None:
    for name in ("lora_alpha", "alpha"):
        assert MergedWeights(BASE, adapter(tmp_path, factors(QUERY), {name: "3.0"})).scale == 1.5
    both = {"alpha": "5", "lora_alpha": "3"}
    assert MergedWeights(BASE, adapter(tmp_path, factors(QUERY), both)).scale == 1.5


def test_alpha_of_the_settings_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 5}))
    assert MergedWeights(BASE, adapter(tmp_path, factors(QUERY))).scale == 2.5
    assert MergedWeights(BASE, adapter(tmp_path, factors(QUERY), ALPHA)).scale == 1.5, "the file itself comes first"


@pytest.mark.parametrize("metadata", [None, ALPHA, {"lora_alpha": "unreadable"}])
def test_alpha_of_the_option_comes_before_all(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    (tmp_path / "adapter_config.json").write_text("damaged")
    assert MergedWeights(BASE, adapter(tmp_path, factors(QUERY), metadata, alpha=7.0)).scale == 3.5


def test_a_missing_alpha_is_named(tmp_path: Path) -> None:
    refused(
        adapter(tmp_path, factors(QUERY)),
        " does not say its alpha, and there is no adapter_config.json beside it; give --lora-alpha (64 for the "
        "released adapter of rank 128).",
    )


@pytest.mark.parametrize("value", ["0", "-2", "nan", "inf"])
@pytest.mark.parametrize("place", ["header", "settings", "option"])
def test_an_alpha_that_is_not_positive_is_named(tmp_path: Path, place: str, value: str) -> None:
    if place == "settings":
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": float(value)}))
    metadata = {"lora_alpha": value} if place == "header" else None
    lora = adapter(tmp_path, factors(QUERY), metadata, alpha=float(value) if place == "option" else None)
    refused(lora, f": lora_alpha is {float(value)}, expected a positive number; give --lora-alpha.")


def test_an_alpha_that_is_no_number_is_named(tmp_path: Path) -> None:
    refused(
        adapter(tmp_path, factors(QUERY), {"lora_alpha": "half"}),
        """: its lora_alpha cannot be read (ValueError("could not convert string to float: 'half'")); """
        "give --lora-alpha.",
    )


DEEP = pytest.param('{"lora_alpha":' * 100_000, id="nested too deeply")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"lora_alpha": null}', '{"lora_alpha": "half"}', DEEP])
def test_damaged_settings_beside_the_file_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    lora = adapter(tmp_path, factors(QUERY))
    with pytest.raises(CheckpointError, match=rf"^{lora.path}: its lora_alpha cannot be read \(.+\); give --lora-al"):
        MergedWeights(BASE, lora)


@pytest.mark.parametrize(("rule", "value"), [("use_rslora", True), ("alpha_pattern", {"blocks.0": 8})])
def test_another_rule_of_scaling_is_refused(tmp_path: Path, rule: str, value: object) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 3, rule: value}))
    lora = adapter(tmp_path, factors(QUERY))
    message = (
        f"adapter_config.json has {rule} {value!r}, but the scale here is alpha / rank for every layer; merge this"
    )
    with pytest.raises(CheckpointError, match=re.escape(message)):
        MergedWeights(BASE, lora)


# --- keys and shapes


@pytest.mark.parametrize(
    "key",
    [
        "blocks.9.self_attn.q.lora_A.default.weight",
        "audio_injector.injector_adain_layers.0.linear.lora_A.default.weight",
        "head.head.lora_A.default.weight",
        f"{QUERY}.lora_A.other.weight",
        f"{QUERY}.lora_C.default.weight",
        f"{QUERY}.lora_A.default.bias",
        f"{QUERY}.lora_magnitude_vector.default.weight",
        "nowhere.weight",
    ],
)
@pytest.mark.parametrize("prefix", [PREFIX, "", "model."])
def test_an_unknown_key_is_named(tmp_path: Path, prefix: str, key: str) -> None:
    lora = adapter(tmp_path, {**factors(QUERY), f"{prefix}{key}": torch.zeros(RANK, 6)}, ALPHA)
    refused(
        lora,
        f" has key '{prefix}{key}', which belongs to no adapted layer (q, k, v, o, ffn.0, ffn.2) and to no tensor of "
        "the network; is the adapter of another model?",
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (A, A.removeprefix(PREFIX)),
        (A, A.replace(".default", "")),
        (f"{PREFIX}{QUERY}.bias", f"{QUERY}.base_layer.bias"),
    ],
)
def test_two_keys_for_one_tensor_are_named(tmp_path: Path, first: str, second: str) -> None:
    tensors = {**factors(QUERY), first: torch.zeros(RANK, 6), second: torch.zeros(RANK, 6)}
    lora = adapter(tmp_path, tensors, ALPHA)
    message = rf"^{lora.path} has keys '(.+)' and '(.+)' for one tensor; take the wrong one out\.$"
    with pytest.raises(CheckpointError, match=message) as caught:
        MergedWeights(BASE, lora)
    named = re.match(message, str(caught.value))
    assert named is not None
    assert set(named.groups()) == {first, second}


@pytest.mark.parametrize("kept", [A, B])
def test_a_factor_without_its_other_is_named(tmp_path: Path, kept: str) -> None:
    lora = adapter(tmp_path, {**factors(FFN), kept: factors(QUERY)[kept]}, ALPHA)
    refused(lora, f" has '{kept}' without its other factor; fetch the whole file.")


@pytest.mark.parametrize(
    ("change", "key", "shape", "expected"),
    [
        ({A: (2, 7)}, A, [2, 7], [2, 6]),
        ({B: (7, 2)}, B, [7, 2], [6, 2]),
        ({B: (6, 3)}, B, [6, 3], [6, 2]),
        ({A: (6, 2), B: (2, 6)}, A, [6, 2], [6, 6]),
        ({A: ()}, A, [], [1, 6]),
        ({A: (2, 6, 1)}, A, [2, 6, 1], [2, 6]),
        ({A: (0, 6), B: (6, 0)}, A, [0, 6], [1, 6]),
        ({f"{PREFIX}{QUERY}.bias": (7,)}, f"{PREFIX}{QUERY}.bias", [7], [6]),
    ],
)
def test_a_wrong_shape_is_named(
    tmp_path: Path, change: dict[str, tuple[int, ...]], key: str, shape: list[int], expected: list[int]
) -> None:
    lora = adapter(tmp_path, {**factors(QUERY), **{name: torch.ones(size) for name, size in change.items()}}, ALPHA)
    refused(lora, f": '{key}' has shape {shape}, expected {expected}; is the adapter of another model?")


def test_a_second_rank_is_named(tmp_path: Path) -> None:
    """The first layer of the file decides; safetensors orders keys of one type by name."""
    lora = adapter(tmp_path, {**factors(FFN), **factors(QUERY, rank=3)}, ALPHA)
    refused(lora, f": '{A}' has shape [3, 6], expected [2, 6]; is the adapter of another model?")


# --- the file


@pytest.mark.parametrize("name", ["nowhere.safetensors", "folder"])
def test_what_is_no_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    message = f"adapter {tmp_path / name} is not a file; give the safetensors file of an adapter."
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        MergedWeights(BASE, LoRA(tmp_path / name))


def test_a_file_without_tensors_is_named(tmp_path: Path) -> None:
    refused(adapter(tmp_path, {}, ALPHA), " holds no tensors; expected an adapter.")


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_half_a_file_is_named(tmp_path: Path, kept: int) -> None:
    lora = adapter(tmp_path, factors(QUERY), ALPHA)
    lora.path.write_bytes(lora.path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=rf"^{lora.path} is not a whole safetensors file \(.+\); fetch it again"):
        MergedWeights(BASE, lora)
