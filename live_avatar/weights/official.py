"""The official Wan2.2-S2V-14B download as a `Checkpoint`: a preset of any widths, and its weights under our names.

Sizes come from the files' own descriptions and shapes; a setting that the networks here do not have is refused. Opening
reads names and shapes, no tensor.

The transformer and the VAE stand in the files under the names of `dit.py` and `vae.py`. Two parts are renamed:

* text: `models_t5_umt5-xxl-enc-bf16.pth` is the state dict of the encoder in the Wan repository, `wan/modules/t5.py`
  (Wan-Video/Wan2.2). Its names and arithmetic are read there; they agree with the conversions that others have
  published between it and `transformers`' UMT5 (wi_0 is the gate, wi_1 is fc1, wo is fc2, a bias table in every
  layer).
* speech: the folder of wav2vec2 holds a `transformers.Wav2Vec2ForCTC`, in whose file torch's weight norm still has
  its old names `weight_g` and `weight_v`; a file saved again by a newer version has the new ones and is read too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from live_avatar.config import (
    LATENT_CHANNELS,
    NETWORK_NAMES,
    PATCH,
    S2V_14B,
    DiTConfig,
    Preset,
    SpeechEncoderConfig,
    TextEncoderConfig,
    VAEConfig,
)
from live_avatar.errors import ArtifactError, CheckpointError, ConfigError
from live_avatar.inputs.text import make_tokenizer
from live_avatar.json_files import read_json
from live_avatar.weights.tensors import (
    Checkpoint,
    RenamedWeights,
    SafetensorsWeights,
    Shapes,
    TorchFileWeights,
    Weights,
    network_shapes,
    validate_tensors,
)

CONFIG_FILE = "config.json"
DIT_FILE = "diffusion_pytorch_model.safetensors"
DIT_INDEX = "diffusion_pytorch_model.safetensors.index.json"
VAE_FILE = "Wan2.1_VAE.pth"
TEXT_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER_FILE = "google/umt5-xxl/tokenizer.json"
SPEECH_FOLDER = "wav2vec2-large-xlsr-53-english"

DIT_SIZES = ("dim", "ffn_dim", "num_heads", "num_layers", "audio_dim")
DIT_SIZES_WITH_DEFAULT = {"num_audio_token": 4, "freq_dim": 256, "text_len": 512}
# Settings whose default in the constructor is another one, so that the file must have them.
DIT_STATED: Mapping[str, Any] = {
    "cond_dim": LATENT_CHANNELS,
    "enable_adain": True,
    "zero_timestep": True,
    "enable_motioner": False,
    "enable_framepack": True,
    "framepack_drop_mode": "padd",
}
# Settings that are so by default; `ignore_for_config` of the class keeps some of them out of the file.
DIT_DEFAULTS: Mapping[str, Any] = {
    "model_type": "s2v",
    "cross_attn_type": "t2v_cross_attn",
    "adain_mode": "attn_norm",
    "add_last_motion": True,
    "enable_tsm": False,
    "patch_size": [1, PATCH, PATCH],
    "in_dim": LATENT_CHANNELS,
    "out_dim": LATENT_CHANNELS,
    "window_size": [-1, -1],
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
}
DIT_UNUSED = ("zero_init", "motion_token_num", "trainable_token_pos_emb")  # of training, and of the motioner
DIT_KEYS = {
    *DIT_SIZES, *DIT_SIZES_WITH_DEFAULT, *DIT_STATED, *DIT_DEFAULTS, *DIT_UNUSED, "audio_inject_layers", "text_dim",
}  # fmt: skip

SPEECH_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "num_conv_pos_embeddings",
    "num_conv_pos_embedding_groups",
)
SPEECH_LISTS = ("conv_dim", "conv_kernel", "conv_stride")
SPEECH_STATED: Mapping[str, Any] = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
SPEECH_DEFAULTS: Mapping[str, Any] = {
    "model_type": "wav2vec2",
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "layer_norm_eps": 1e-5,
    "add_adapter": False,
}
SPEECH_PREFIX = "wav2vec2."
SPEECH_WEIGHT_NORM: Mapping[str, str] = {
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}
SPEECH_UNUSED = ("lm_head.weight", "lm_head.bias")  # letters of a transcript; the hidden states come before them

TEXT_BUCKETS = 32
TEXT_IN_BLOCK: Mapping[str, str] = {
    "layer.0.layer_norm": "norm1",
    "layer.0.SelfAttention.q": "attn.q",
    "layer.0.SelfAttention.k": "attn.k",
    "layer.0.SelfAttention.v": "attn.v",
    "layer.0.SelfAttention.o": "attn.o",
    "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding",
    "layer.1.layer_norm": "norm2",
    "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
    "layer.1.DenseReluDense.wi_1": "ffn.fc1",
    "layer.1.DenseReluDense.wo": "ffn.fc2",
}
TEXT_OUTSIDE: Mapping[str, str] = {
    "shared.weight": "token_embedding.weight",
    "encoder.embed_tokens.weight": "token_embedding.weight",  # tied
    "encoder.final_layer_norm.weight": "norm.weight",
}


def is_official(folder: Path) -> bool:
    """Whether any file of the official download is there, so that what else is missing can be named."""
    return any((folder / name).exists() for name in (CONFIG_FILE, DIT_INDEX, DIT_FILE, VAE_FILE, TEXT_FILE))


def stored_name(part: str, name: str) -> str:
    """The official file's name for a tensor of our state dict of `part`."""
    if part == "speech":
        for ours, theirs in SPEECH_WEIGHT_NORM.items():
            name = name.replace(ours, theirs)
        return SPEECH_PREFIX + name
    if part == "text":
        if name in TEXT_OUTSIDE:
            return TEXT_OUTSIDE[name]
        block, inner = name.removeprefix("encoder.block.").split(".", 1)
        return f"blocks.{block}.{TEXT_IN_BLOCK[inner.removesuffix('.weight')]}.weight"
    return name


def open_official(folder: Path) -> Checkpoint:
    """The preset that a folder's files describe and their weights, each tensor validated; reads none.

    The preset is `S2V_14B` if its networks are, else it is named "custom"; the stream's settings are `S2V_14B`'s.
    Raises `CheckpointError` for a missing or damaged file, an unsupported setting (with its key, its value and what
    is supported), and the first missing, surplus or wrong-shaped tensor under its official name.
    """
    index = folder / DIT_INDEX
    stored: dict[str, Weights] = {
        "dit": SafetensorsWeights(index if index.is_file() else folder / DIT_FILE),
        "vae": TorchFileWeights(folder / VAE_FILE),
        "speech": _speech_weights(folder / SPEECH_FOLDER),
        "text": TorchFileWeights(folder / TEXT_FILE),
    }
    preset = _preset(folder, stored)
    try:
        shapes = network_shapes(preset)
    except ValueError as error:  # of the constructors in `transformers`
        raise CheckpointError(f"the sizes in {folder} make no network ({error}); fetch the official files.") from error
    parts = {part: _validated(part, stored[part], shapes[part]) for part in NETWORK_NAMES}
    tokenizer = folder / TOKENIZER_FILE
    try:
        make_tokenizer(preset, tokenizer)
    except ArtifactError as error:
        raise CheckpointError(str(error)) from error
    return Checkpoint(preset, parts, tokenizer)


def _validated(part: str, stored: Weights, expected: Shapes) -> Weights:
    """Weights under our names, once the stored names and shapes are found to be as expected."""
    given = stored.shapes()
    names = {name: stored_name(part, name) for name in expected}
    unused: Sequence[str] = ()
    if part == "speech":
        names |= {name: SPEECH_PREFIX + name for name in expected if SPEECH_PREFIX + name in given}
        unused = SPEECH_UNUSED
    kept = RenamedWeights(stored, {name: name for name in given if name not in unused})
    validate_tensors(kept, {names[name]: shape for name, shape in expected.items()})
    return RenamedWeights(stored, names)


def _speech_weights(folder: Path) -> Weights:
    older = folder / "pytorch_model.bin"
    newer = folder / "model.safetensors"
    return TorchFileWeights(older) if older.is_file() and not newer.is_file() else SafetensorsWeights(newer)


def _preset(folder: Path, stored: Mapping[str, Weights]) -> Preset:
    try:
        speech = _speech_config(folder / SPEECH_FOLDER / "config.json")
        text = _text_config(stored["text"])
        preset = Preset(
            name="custom",
            dit=_dit_config(folder / CONFIG_FILE, speech, text),
            vae=VAEConfig(dim=_shape(stored["vae"], "encoder.conv1.weight", 5)[0]),
            speech=speech,
            text=text,
            stream=S2V_14B.stream,
        )
    except ConfigError as error:
        raise CheckpointError(f"the files of {folder} do not fit together: {error}") from error
    released = all(getattr(preset, part) == getattr(S2V_14B, part) for part in NETWORK_NAMES)
    return S2V_14B if released else preset


def _dit_config(path: Path, speech: SpeechEncoderConfig, text: TextEncoderConfig) -> DiTConfig:
    values = _settings(path)
    unknown = sorted(key for key in values.keys() - DIT_KEYS if not key.startswith("_"))  # diffusers' own begin so
    if unknown:
        raise CheckpointError(
            f"{path} has unknown key {unknown[0]!r}; expected the constructor's arguments of the Wan2.2-S2V "
            "transformer. Mend the key or fetch the official file."
        )
    _check_settings(path, values, DIT_STATED, DIT_DEFAULTS)
    return DiTConfig(
        **{key: _size(path, values, key) for key in DIT_SIZES},
        **{key: _size(path, {key: default, **values}, key) for key, default in DIT_SIZES_WITH_DEFAULT.items()},
        text_dim=_size(path, {"text_dim": text.d_model, **values}, "text_dim"),
        audio_states=speech.num_hidden_layers + 1,
        audio_inject_layers=_whole_numbers(path, values, "audio_inject_layers", least=0),
    )


def _speech_config(path: Path) -> SpeechEncoderConfig:
    values = _settings(path)
    _check_settings(path, values, SPEECH_STATED, SPEECH_DEFAULTS)
    given: dict[str, Any] = {key: _size(path, values, key) for key in SPEECH_SIZES}
    given |= {key: _whole_numbers(path, values, key, least=1) for key in SPEECH_LISTS}
    return SpeechEncoderConfig(**given)


def _text_config(stored: Weights) -> TextEncoderConfig:
    vocabulary, width = _shape(stored, "token_embedding.weight", 2)
    inner, _ = _shape(stored, "blocks.0.attn.q.weight", 2)
    buckets, heads = _shape(stored, "blocks.0.pos_embedding.embedding.weight", 2)
    if buckets != TEXT_BUCKETS:
        raise CheckpointError(
            f"{stored.origin} has {buckets} relative position buckets, but only {TEXT_BUCKETS} are supported; fetch "
            "the official file."
        )
    blocks = (re.match(r"blocks\.(\d+)\.", name) for name in stored.shapes())
    return TextEncoderConfig(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=inner // heads,
        d_ff=_shape(stored, "blocks.0.ffn.fc1.weight", 2)[0],
        num_layers=1 + max(int(block[1]) for block in blocks if block),
        num_heads=heads,
    )


def _shape(stored: Weights, name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor that tells a size."""
    shape = stored.shapes().get(name)
    if shape is None or len(shape) != dimensions or 0 in shape:
        found = "is missing" if shape is None else f"has shape {list(shape)}"
        raise CheckpointError(
            f"{stored.origin}: tensor {name!r} {found}, expected one of {dimensions} dimensions; fetch the official "
            "file."
        )
    return shape


def _settings(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise CheckpointError(
            f"checkpoint file {path} does not exist; expected the folder of the Wan2.2-S2V-14B download, whole."
        )
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a JSON file ({error}); fetch it again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds {type(values).__name__}, expected an object of settings; fetch it again.")
    return values


def _check_settings(
    path: Path, values: Mapping[str, Any], stated: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    _require_keys(path, values, stated)
    for key, supported in {**stated, **defaults}.items():
        value = values.get(key, supported)
        if value != supported or isinstance(value, bool) != isinstance(supported, bool):
            raise CheckpointError(
                f"{path}: {key} is {value!r}, but only {supported!r} is supported; fetch the official file."
            )


def _require_keys(path: Path, values: Mapping[str, Any], keys: Iterable[str]) -> None:
    for key in keys:
        if key not in values:
            raise CheckpointError(f"{path} lacks key {key!r}; fetch the official file.")


def _size(path: Path, values: Mapping[str, Any], key: str) -> int:
    _require_keys(path, values, [key])
    return _whole(path, key, values[key])


def _whole_numbers(path: Path, values: Mapping[str, Any], key: str, least: int) -> tuple[int, ...]:
    _require_keys(path, values, [key])
    if not isinstance(values[key], list):
        raise CheckpointError(f"{path}: {key} is {values[key]!r}, expected a list of whole numbers; mend it.")
    return tuple(_whole(path, key, value, least) for value in values[key])


def _whole(path: Path, key: str, value: Any, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise CheckpointError(f"{path}: {key} has {value!r}, expected a whole number of at least {least}; mend it.")
    return value
