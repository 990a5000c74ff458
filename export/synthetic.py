"""A checkpoint with the layout of the official download and random weights: `python -m export.synthetic`.

For trying the whole path, at any widths and depths, without a download: the names, shapes, types and kinds of file are
those that `weights.official` reads. Every tensor is a function of the seed and its name, as in `RandomWeights`. The
files are first laid out without values (`lay_out`; they take no room on the disk then) and then filled tensor by
tensor, so that the largest tensor decides the memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

from live_avatar.config import PRESETS, Preset
from live_avatar.errors import ConfigError, ExportError, LiveAvatarError
from live_avatar.exporter.quantization import PART, QUANTIZED, Calibration
from live_avatar.model.dit import CausalDiT
from live_avatar.model.linears import is_fp8, is_lora_target
from live_avatar.model.networks import meta_networks
from live_avatar.weights.official import (
    CONFIG_FILE,
    DIT_DEFAULTS,
    DIT_FILE,
    DIT_INDEX,
    DIT_SIZES,
    DIT_SIZES_WITH_DEFAULT,
    DIT_STATED,
    SPEECH_DEFAULTS,
    SPEECH_FOLDER,
    SPEECH_STATED,
    TEXT_FILE,
    TOKENIZER_FILE,
    VAE_FILE,
    stored_name,
)
from live_avatar.weights.tensors import RandomWeights, Shapes, shapes_of

SHARD_MIB = 9_500  # about the official shards' size
ASCII = [chr(code) for code in range(0x21, 0x7F)]
PIECES = ["<pad>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *ASCII]
LETTERS = 33  # of the transcripts that the official wav2vec2 model writes
LORA_PREFIX = "base_model.model."
NOT_IN_CONFIG = ("patch_size", "cross_attn_norm", "qk_norm", "window_size", "cross_attn_type")

# Option -> the fields that it sets, as part and name; a size that two networks share stands in both.
SIZES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "dim": (("dit", "dim"),),
    "heads": (("dit", "num_heads"),),
    "layers": (("dit", "num_layers"),),
    "ffn-dim": (("dit", "ffn_dim"),),
    "vae-dim": (("vae", "dim"),),
    "text-dim": (("text", "d_model"), ("dit", "text_dim")),
    "text-heads": (("text", "num_heads"),),
    "text-layers": (("text", "num_layers"),),
    "text-ffn-dim": (("text", "d_ff"),),
    "text-vocab": (("text", "vocab_size"),),
    "speech-dim": (("speech", "hidden_size"), ("dit", "audio_dim")),
    "speech-heads": (("speech", "num_attention_heads"),),
    "speech-layers": (("speech", "num_hidden_layers"),),
    "speech-ffn-dim": (("speech", "intermediate_size"),),
}


@dataclass(frozen=True)
class Slot:
    """Where a tensor's bytes stand: `name` is the tensor's in our state dict of `part`."""

    part: str
    name: str
    path: Path
    offset: int
    dtype: torch.dtype


def official_preset(preset: Preset, sizes: Mapping[str, int]) -> Preset:
    """The preset with other sizes (`SIZES`) and the official kind of tokenizer.

    Injectors behind the last layer fall away. Raises `ConfigError` for sizes that make no network.
    """
    changes: dict[str, dict[str, Any]] = {"dit": {}, "vae": {}, "speech": {}, "text": {"tokenizer": "umt5"}}
    for option, size in sizes.items():
        for part, field in SIZES[option]:
            changes[part][field] = size
    layers = changes["dit"].get("num_layers", preset.dit.num_layers)
    changes["dit"]["audio_inject_layers"] = tuple(i for i in preset.dit.audio_inject_layers if i < layers)
    changes["dit"]["audio_states"] = changes["speech"].get("num_hidden_layers", preset.speech.num_hidden_layers) + 1
    parts: dict[str, Any] = {
        part: dataclasses.replace(getattr(preset, part), **fields) for part, fields in changes.items()
    }
    if parts["text"].vocab_size < len(PIECES):
        raise ConfigError(
            f"a vocabulary of {parts['text'].vocab_size} tokens is too small; the tokenizer has {len(PIECES)}."
        )
    return dataclasses.replace(preset, **parts)


def write_checkpoint(preset: Preset, output: Path, seed: int | None, shard_bytes: int = SHARD_MIB * 2**20) -> None:
    """Writes the whole folder or none; with seed None every weight is zero, and the files are holes.

    Raises `ExportError` if `output` exists, `ConfigError` for impossible sizes.
    """
    with _finished(output) as unfinished:
        unfinished.mkdir()
        slots = lay_out(preset, unfinished, shard_bytes)
        if seed is not None:
            _fill(slots, _random(preset, seed))


def made_up_calibration(preset: Preset) -> Calibration:
    """As if the largest input of every quantized linear were 1: enough to see what a compiler makes of the graphs."""
    with torch.device("meta"):
        modules = CausalDiT(preset.dit).named_modules()
    linears = {f"{PART}{name}": 1.0 for name, module in modules if isinstance(module, nn.Linear) and is_fp8(name)}
    return Calibration(preset.name, 1, dict.fromkeys(QUANTIZED, linears))


def lora_shapes(preset: Preset, rank: int) -> Shapes:
    """Keys and shapes of an adapter of every target layer, with the keys of the release (spec section 14)."""
    factors: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes_of(_networks(preset)["dit"]).items():
        module = name.removesuffix(".weight")
        if module != name and is_lora_target(module):
            factors[f"{LORA_PREFIX}{module}.lora_A.default.weight"] = (rank, shape[1])
            factors[f"{LORA_PREFIX}{module}.lora_B.default.weight"] = (shape[0], rank)
    return factors


def write_lora(preset: Preset, output: Path, seed: int, rank: int) -> None:
    """Writes an adapter, bfloat16, alpha half the rank as in the release. Raises `ExportError` if `output` exists."""
    shapes = lora_shapes(preset, rank)
    with _finished(output) as unfinished:
        offsets = _lay_out_safetensors(unfinished, shapes, torch.bfloat16, {"lora_alpha": str(rank / 2)})
        slots = [Slot("lora", name, unfinished, offset, torch.bfloat16) for name, offset in offsets.items()]
        _fill(slots, {"lora": RandomWeights(shapes, seed)})


def lay_out(preset: Preset, folder: Path, shard_bytes: int) -> list[Slot]:
    """Makes every file with its names and shapes, but without values: weights are zeros that take no room."""
    shapes = {part: shapes_of(network) for part, network in _networks(preset).items()}
    (folder / SPEECH_FOLDER).mkdir()
    (folder / TOKENIZER_FILE).parent.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(json.dumps(_dit_settings(preset), indent=2))
    (folder / SPEECH_FOLDER / "config.json").write_text(json.dumps(_speech_settings(preset), indent=2))
    make_tokenizer_file(folder / TOKENIZER_FILE)
    return [
        *_dit_slots(shapes["dit"], folder, shard_bytes),
        *_torch_slots("vae", shapes["vae"], folder / VAE_FILE, torch.float32),
        *_torch_slots("text", shapes["text"], folder / TEXT_FILE, torch.bfloat16),
        *_speech_slots(shapes["speech"], folder / SPEECH_FOLDER / "model.safetensors", preset.speech.hidden_size),
    ]


def make_tokenizer_file(path: Path) -> None:
    """A tokenizer of the official kind: unigram pieces, here single letters and bytes, and an end token."""
    tokenizer = tokenizers.Tokenizer(
        models.Unigram([(piece, -10.0) for piece in PIECES], unk_id=PIECES.index("<unk>"), byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", PIECES.index("</s>"))]
    )
    tokenizer.save(str(path))


def _networks(preset: Preset) -> Mapping[str, torch.nn.Module]:
    try:
        return meta_networks(preset).parts()
    except ConfigError:
        raise
    except ValueError as error:  # of the constructors in `transformers`
        raise ConfigError(f"these sizes make no network: {error} Change one.") from error


def _random(preset: Preset, seed: int) -> Mapping[str, RandomWeights]:
    """Each part from a seed of its own, as `live_avatar.weights.checkpoint` draws them."""
    parts = _networks(preset).items()
    return {part: RandomWeights(shapes_of(network), seed + index) for index, (part, network) in enumerate(parts)}


def _dit_settings(preset: Preset) -> dict[str, Any]:
    config = asdict(preset.dit)
    fixed = {key: value for key, value in {**DIT_STATED, **DIT_DEFAULTS}.items() if key not in NOT_IN_CONFIG}
    sizes = {key: config[key] for key in (*DIT_SIZES, *DIT_SIZES_WITH_DEFAULT, "audio_inject_layers")}
    return {"_class_name": "WanModel_S2V", **fixed, **sizes}


def _speech_settings(preset: Preset) -> dict[str, Any]:
    return {
        "architectures": ["Wav2Vec2ForCTC"],
        **SPEECH_DEFAULTS,
        **SPEECH_STATED,
        **asdict(preset.speech),
        "vocab_size": LETTERS,
    }


def _dit_slots(shapes: Shapes, folder: Path, shard_bytes: int) -> list[Slot]:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if shards[-1] and _bytes({**shards[-1], name: shape}, torch.bfloat16) > shard_bytes:
            shards.append({})
        shards[-1][name] = shape
    stem, suffix = DIT_FILE.rsplit(".", 1)
    slots: list[Slot] = []
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        path = folder / f"{stem}-{number:05}-of-{len(shards):05}.{suffix}"
        offsets = _lay_out_safetensors(path, shard, torch.bfloat16)
        slots += [Slot("dit", name, path, offset, torch.bfloat16) for name, offset in offsets.items()]
        placed |= dict.fromkeys(shard, path.name)
    index = {"metadata": {"total_size": _bytes(shapes, torch.bfloat16)}, "weight_map": placed}
    (folder / DIT_INDEX).write_text(json.dumps(index, indent=2))
    return slots


def _torch_slots(part: str, shapes: Shapes, path: Path, dtype: torch.dtype) -> list[Slot]:
    stored = {stored_name(part, name): name for name in shapes}  # tied names share one stored tensor
    offsets = _lay_out_torch(path, {name: shapes[ours] for name, ours in stored.items()}, dtype)
    return [Slot(part, ours, path, offsets[name], dtype) for name, ours in stored.items()]


def _speech_slots(shapes: Shapes, path: Path, width: int) -> list[Slot]:
    stored = {stored_name("speech", name): shape for name, shape in shapes.items()}
    head = {"lm_head.weight": (LETTERS, width), "lm_head.bias": (LETTERS,)}  # stays zero: nothing reads it
    offsets = _lay_out_safetensors(path, stored | head, torch.float32)
    return [Slot("speech", name, path, offsets[stored_name("speech", name)], torch.float32) for name in shapes]


def _lay_out_safetensors(
    path: Path, shapes: Shapes, dtype: torch.dtype, metadata: Mapping[str, str] | None = None
) -> dict[str, int]:
    """A safetensors file without values; the offset of every tensor.

    The format: length of the header in 8 bytes, the header in JSON, then the tensors without gaps.
    """
    codes = {torch.float32: "F32", torch.bfloat16: "BF16"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + end)
    return {name: start + header[name]["data_offsets"][0] for name in shapes}


def _lay_out_torch(path: Path, shapes: Shapes, dtype: torch.dtype) -> dict[str, int]:
    """A state dict in torch's format without values; the offset of every tensor."""
    with FakeTensorMode():
        state = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(state, path)
    with FakeTensorMode():
        laid_out = torch.load(path)
    return {name: tensor.untyped_storage()._checkpoint_offset for name, tensor in laid_out.items()}


def _fill(slots: list[Slot], parts: Mapping[str, RandomWeights]) -> None:
    """Writes the values; parameters are drawn under our names."""
    for slot in tqdm(slots, desc="Writing", unit="tensor", file=sys.stderr):
        with slot.path.open("r+b") as file:
            file.seek(slot.offset)
            file.write(_raw(parts[slot.part].read(slot.name).to(slot.dtype)))


def _raw(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data


def _bytes(shapes: Shapes, dtype: torch.dtype) -> int:
    return sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize


@contextlib.contextmanager
def _finished(output: Path) -> Iterator[Path]:
    """A place beside `output` that becomes it at the end, unless there was an error."""
    if output.exists():
        raise ExportError(f"{output} exists; choose another place or remove it.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
        yield Path(folder) / output.name
        (Path(folder) / output.name).rename(output)


def _size_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(list(SIZES)):
        where = " and ".join(f"{part}.{field}" for part, field in SIZES[option])
        command = click.option(f"--{option}", type=click.IntRange(1), help=f"Other {where}.")(command)
    return command


@click.command()
@click.option("--preset", "preset_name", type=click.Choice(sorted(PRESETS)), default="tiny", show_default=True)
@_size_options
@click.option("--shard-mib", type=click.IntRange(1), default=SHARD_MIB, show_default=True, help="Largest shard.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to make.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--zeros", is_flag=True, help="Leave the weights zero: files of full size that take no room on the disk.")
@click.option("--lora", type=click.Path(path_type=Path), help="Also write an adapter to this file.")
@click.option("--lora-rank", type=click.IntRange(1), default=128, show_default=True)
def main(
    preset_name: str,
    output: Path,
    seed: int,
    zeros: bool,
    shard_mib: int,
    lora: Path | None,
    lora_rank: int,
    **sizes: int | None,
) -> None:
    """Writes a checkpoint of random weights with the layout of the official Wan2.2-S2V-14B download."""
    given = {name.replace("_", "-"): size for name, size in sizes.items() if size is not None}
    try:
        preset = official_preset(PRESETS[preset_name], given)
        if lora is not None and lora.exists():
            raise ExportError(f"{lora} exists; choose another place or remove it.")
        write_checkpoint(preset, output, None if zeros else seed, shard_mib * 2**20)
        if lora is not None:
            write_lora(preset, lora, seed, lora_rank)
    except LiveAvatarError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
