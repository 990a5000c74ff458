"""Random checkpoints with the layout of the official download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open

from export import synthetic
from export.synthetic import lora_shapes, main, official_preset, write_checkpoint, write_lora
from live_avatar.config import PRESETS, S2V_14B, TINY, Preset
from live_avatar.errors import ConfigError, ExportError
from live_avatar.model.networks import meta_networks
from live_avatar.weights.checkpoint import open_checkpoint
from live_avatar.weights.lora import LoRA, MergedWeights
from live_avatar.weights.official import DIT_INDEX, SPEECH_FOLDER, TEXT_FILE, open_official
from live_avatar.weights.tensors import RandomWeights, SafetensorsWeights, TorchFileWeights, shapes_of
from tests.export.conftest import LEAST

SMALL = official_preset(LEAST, {})
SEED = 3
SIZES = {
    "dim": 16, "heads": 2, "layers": 3, "ffn-dim": 20, "vae-dim": 4,
    "text-dim": 24, "text-heads": 3, "text-layers": 1, "text-ffn-dim": 28, "text-vocab": 400,
    "speech-dim": 32, "speech-heads": 2, "speech-layers": 2, "speech-ffn-dim": 36,
}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The least sizes that an official folder can have: tests must not change it."""
    folder = tmp_path_factory.mktemp("synthetic") / "small"
    write_checkpoint(official_preset(TINY, SIZES), folder, SEED, shard_bytes=20_000)
    return folder


def test_every_size_is_found_again(small: Path) -> None:
    assert SIZES.keys() == synthetic.SIZES.keys()
    found = open_official(small).preset
    for option, size in SIZES.items():
        for part, field in synthetic.SIZES[option]:
            assert getattr(getattr(found, part), field) == size, option
    assert found.dit.audio_inject_layers == (0, 2)
    assert found.dit.audio_states == 3
    assert found.text.tokenizer == "umt5"


def test_values_are_those_of_the_seed_in_the_published_types(small: Path) -> None:
    checkpoint = open_official(small)
    parts = meta_networks(checkpoint.preset).parts().items()
    for index, (part, network) in enumerate(parts):
        dtype = torch.bfloat16 if part in ("dit", "text") else torch.float32
        drawn = RandomWeights(shapes_of(network), SEED + index)
        for name in shapes_of(network).keys() - {"shared.weight"}:  # the other name of the tied table is drawn
            assert torch.equal(checkpoint.parts[part].read(name), drawn.read(name).to(dtype)), name
    text = checkpoint.parts["text"]
    assert torch.equal(text.read("shared.weight"), text.read("encoder.embed_tokens.weight"))


def test_shards_are_no_larger_than_asked_unless_by_one_tensor(small: Path) -> None:
    shards = [path for path in SafetensorsWeights(small / DIT_INDEX).files if path.suffix == ".safetensors"]
    assert len(shards) > 3
    assert shards[0].name == f"diffusion_pytorch_model-00001-of-{len(shards):05}.safetensors"
    for path in shards:
        with safe_open(path, "pt") as file:
            sizes = [file.get_tensor(name).numel() * 2 for name in file.keys()]  # noqa: SIM118 - no mapping
        assert sum(sizes) <= 20_000 or len(sizes) == 1
    index = json.loads((small / DIT_INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(
        tensor.numel() * 2 for tensor in map(open_official(small).parts["dit"].read, index["weight_map"])
    )


def test_wav2vec2_has_a_head_and_the_text_table_stands_once(small: Path) -> None:
    assert SafetensorsWeights(small / SPEECH_FOLDER / "model.safetensors").shapes()["lm_head.weight"] == (33, 32)
    assert len(TorchFileWeights(small / TEXT_FILE).shapes()) == 2 + 10


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(small: Path, tmp_path: Path) -> None:
    preset = official_preset(TINY, SIZES)
    write_checkpoint(preset, tmp_path / "again", SEED, shard_bytes=20_000)
    again, expected = contents(tmp_path / "again"), contents(small)
    assert again.keys() == expected.keys()
    for name in expected:
        if not name.endswith(".pth"):  # torch writes a serialization id of its own
            assert again[name] == expected[name], name
    write_checkpoint(preset, tmp_path / "other", SEED + 1, shard_bytes=20_000)
    ours, theirs = open_official(tmp_path / "other").parts["dit"], open_official(small).parts["dit"]
    assert not torch.equal(ours.read("head.head.weight"), theirs.read("head.head.weight"))


def peak_bytes() -> int:
    """Largest resident memory since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def test_memory_is_that_of_the_largest_tensor_not_of_the_files(tmp_path: Path) -> None:
    preset = official_preset(LEAST, {"dim": 1024, "heads": 8, "layers": 10, "ffn-dim": 1024})
    forget_peak()
    before = peak_bytes()
    write_checkpoint(preset, tmp_path / "folder", SEED)
    written = sum(path.stat().st_size for path in (tmp_path / "folder").rglob("*") if path.is_file())
    largest = 4 * 6 * 1024**2  # time_projection in float32
    assert written > 240 * 2**20
    assert peak_bytes() - before < 3 * largest + 80 * 2**20 < written


def test_a_broken_run_leaves_nothing(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "_raw", lambda tensor: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_checkpoint(SMALL, tmp_path / "folder", SEED)
        with pytest.raises(ZeroDivisionError):
            write_lora(SMALL, tmp_path / "adapter.safetensors", SEED, rank=2)
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_not_replaced(tmp_path: Path) -> None:
    for write in (lambda: write_checkpoint(SMALL, tmp_path, SEED), lambda: write_lora(SMALL, tmp_path, SEED, rank=2)):
        with pytest.raises(ExportError, match=rf"{tmp_path} exists; choose another place or remove it\."):
            write()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"heads": 5}, r"dim 32 is not a multiple of 5 heads; change one\."),
        ({"text-vocab": 300}, r"a vocabulary of 300 tokens is too small; the tokenizer has 354\."),
        ({"speech-heads": 7}, r"these sizes make no network: .*7.* Change one\."),
    ],
)
def test_sizes_that_make_no_network_are_named(tmp_path: Path, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write_checkpoint(official_preset(LEAST, sizes), tmp_path / "folder", SEED)
    assert list(tmp_path.iterdir()) == []


def test_the_released_adapter_has_896_tensors() -> None:
    shapes = lora_shapes(S2V_14B, 128)
    assert len(shapes) == 896
    assert sum(a * b for a, b in shapes.values()) == 676_331_520
    assert shapes["base_model.model.blocks.0.ffn.2.lora_A.default.weight"] == (128, 13_824)
    assert shapes["base_model.model.audio_injector.injector.11.q.lora_B.default.weight"] == (5120, 128)


def test_the_command_writes_a_checkpoint_and_its_adapter(tmp_path: Path) -> None:
    options = [f"--{option}={size}" for option, size in SIZES.items()]
    folder, adapter = tmp_path / "folder", tmp_path / "adapter.safetensors"
    result = CliRunner().invoke(main, [*options, "--output", str(folder), "--lora", str(adapter), "--lora-rank=4"])
    assert result.exit_code == 0, result.output
    checkpoint = open_checkpoint(None, folder, LoRA(adapter))
    merged, base = checkpoint.parts["dit"], open_official(folder).parts["dit"]
    assert isinstance(merged, MergedWeights)
    assert merged.scale == 0.5
    assert len(merged.merged) == 3 * 10 + 2 * 4
    name = "blocks.0.self_attn.q.weight"
    assert not torch.equal(merged.read(name), base.read(name))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", "5"], "dim 128 is not a multiple of 5 heads; change one."),
        (["--dim", "0"], "Invalid value for '--dim': 0 is not in the range x>=1."),
        (["--output", "."], ". exists; choose another place or remove it."),
        (["--lora", "."], ". exists; choose another place or remove it."),
        (["--preset", "huge"], "Invalid value for '--preset': 'huge' is not one of 's2v-14b', 'tiny'."),
    ],
)
def test_a_bad_option_is_one_sentence(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["--output", str(tmp_path / "folder"), *arguments])
    assert result.exit_code != 0
    assert f"Error: {message}\n" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_only_the_tokenizer_differs_from_the_preset(preset: Preset) -> None:
    changed: dict[str, Any] = official_preset(preset, {}).to_dict()
    assert changed.pop("text") == preset.to_dict()["text"] | {"tokenizer": "umt5"}
    assert changed == {key: value for key, value in preset.to_dict().items() if key != "text"}


def test_zeros_take_no_room(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--zeros", "--output", str(tmp_path / "empty")])
    assert result.exit_code == 0, result.output
    files = [path for path in (tmp_path / "empty").rglob("*") if path.suffix in (".safetensors", ".pth")]
    assert sum(path.stat().st_size for path in files) > 4 * sum(path.stat().st_blocks * 512 for path in files)
    checkpoint = open_official(tmp_path / "empty")
    assert not checkpoint.parts["dit"].read("blocks.0.ffn.0.weight").any()
