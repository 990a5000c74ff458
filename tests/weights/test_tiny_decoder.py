"""The file of a tiny decoder: what is taken, and the sentence for everything else."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from live_avatar.assets import TINY_WEIGHTS
from live_avatar.config import S2V_14B, TINY, TINY_DECODER, TAEConfig
from live_avatar.errors import CheckpointError
from live_avatar.graphs.contract import contracts
from live_avatar.graphs.memory import decoder_memory
from live_avatar.weights.checkpoint import load_networks, open_checkpoint
from live_avatar.weights.tiny_decoder import SHIPPED_FILE, TAKEN, with_tiny_decoder
from tests.support.repository import ROOT
from training.config import load
from training.data.clips import Split, make_clip
from training.decoder import decoded
from training.encoded import pixels
from training.reconstruction import psnr
from training.vae import Streams, reconstruct

LEAST_PSNR_DB = 27.0
FILE = ROOT / "tests/golden/data/tae_weights.safetensors"
Tensors = dict[str, Tensor]


@pytest.fixture
def tensors() -> Tensors:
    return load_file(FILE)


@pytest.mark.parametrize("name", ["taew2_1.safetensors", "taew2_1.pth"])
def test_the_sizes_are_those_of_the_file(tensors: Tensors, tmp_path: Path, name: str) -> None:
    whole = {**tensors, "encoder.0.weight": torch.zeros(64, 3, 3, 3)}  # the published file has an encoder, too
    path = tmp_path / name
    save_file(whole, path) if path.suffix == ".safetensors" else torch.save(whole, path)
    checkpoint = with_tiny_decoder(open_checkpoint(TINY), path)
    assert checkpoint.preset.tae == TAEConfig((24, 16, 12, 8))
    assert checkpoint.preset == type(TINY).from_dict(checkpoint.preset.to_dict())
    decoder = load_networks(checkpoint).tae
    assert decoder is not None
    assert decoder.state_dict().keys() == tensors.keys()
    assert all(torch.equal(value, tensors[key]) for key, value in decoder.state_dict().items())
    assert list(checkpoint.parts[TINY_DECODER].files) == [path]


def test_the_word_tiny_is_the_decoder_of_the_packages_own_vae(tmp_path: Path) -> None:
    for size in ({}, {"height": 64, "width": 128}):
        checkpoint = with_tiny_decoder(open_checkpoint(TINY.with_stream(**size)), Path("tiny"))
        assert list(checkpoint.parts[TINY_DECODER].files) == [SHIPPED_FILE]
        assert checkpoint.preset.tae == load(ROOT / "training/configs/tiny.toml").decoder.network
    other = replace(TINY, weight_seed=1)
    with pytest.raises(CheckpointError, match=r"this VAE is random weights of seed 2; give a decoder that was trained"):
        with_tiny_decoder(open_checkpoint(other), Path("tiny"))
    copy = shutil.copytree(TINY_WEIGHTS, tmp_path / "copy")
    with pytest.raises(CheckpointError, match=rf"this VAE is {copy}/vae\.safetensors; give a decoder"):
        with_tiny_decoder(open_checkpoint(TINY, copy), Path("tiny"))


@torch.no_grad()
def test_the_packages_decoder_gives_the_vaes_frames_softer() -> None:
    """Of an unseen face that talks, behind the warm-up as a server does it."""
    networks = load_networks(with_tiny_decoder(open_checkpoint(TINY), Path("tiny")))
    clip = make_clip(Split.TEST, 0, 2)
    video = pixels(np.concatenate([np.repeat(clip.picture[None], 25, axis=0), clip.frames]))
    exact, latents = reconstruct(networks.vae, video, Streams())
    assert networks.tae is not None
    softer = decoded(networks.tae, latents)
    assert psnr(softer[:, :, 25:], exact[:, :, 25:]) > LEAST_PSNR_DB


@pytest.mark.slow
def test_a_session_and_a_gpu_hold_less() -> None:
    tiny = replace(S2V_14B, tae=TAEConfig())
    states = [spec for spec in contracts(tiny)["vae_decoder"].inputs if spec.resident]
    assert len(states) == 9
    assert all(spec.shape[0] == 1 for spec in states)
    assert decoder_memory(tiny).total(1) < decoder_memory(S2V_14B).total(1)
    vae, tae = (memory.total(1) - memory.total(0) for memory in (decoder_memory(S2V_14B), decoder_memory(tiny)))
    assert tae < vae / 10


def widened(tensors: Tensors) -> Tensors:
    return {**tensors, "decoder.1.weight": torch.zeros(24, 48, 3, 3)}


def shuffled(tensors: Tensors) -> Tensors:
    return {**tensors, "decoder.22.weight": torch.zeros(12, 8, 3, 3)}


def without(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != "decoder.4.conv.2.bias"}


def surplus(tensors: Tensors) -> Tensors:
    return {**tensors, "decoder.23.weight": torch.zeros(3, 3, 1, 1)}


def still(tensors: Tensors) -> Tensors:
    return {**tensors, "decoder.19.conv.weight": torch.zeros(12, 12, 1, 1)}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (widened, "decodes 48 latent channels, but the model's latents have 16; give "),
        (shuffled, "gives 12 values for a pixel, expected 3: variants that shuffle pixels are not taken; give "),
        (without, "lacks 1 tensors, such as 'decoder.4.conv.2.bias'; is it of another preset? Expected "),
        (surplus, "has unknown 1 tensors, such as 'decoder.23.weight'; is it of another preset? Expected "),
        (still, "is another decoder: time_upscale (1, 2, 1) makes 2 frames of 8x8 pixels of a latent; expected "),
        (lambda _: {"a": torch.zeros(1)}, "tensor 'decoder.1.weight' is missing, expected a convolution's of four "),
    ],
)
def test_another_network_is_refused(
    tensors: Tensors, tmp_path: Path, change: Callable[[Tensors], Tensors], sentence: str
) -> None:
    path = tmp_path / "a.safetensors"
    save_file(change(tensors), path)
    with pytest.raises(CheckpointError, match=re.escape(sentence)) as caught:
        with_tiny_decoder(open_checkpoint(TINY), path)
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith(f"{TAKEN}.")


def test_what_is_no_whole_file_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(TINY)
    with pytest.raises(CheckpointError, match=r"decoder file .*none\.pth does not exist; give taew2_1"):
        with_tiny_decoder(checkpoint, tmp_path / "none.pth")
    for name, sentence in (("cut.safetensors", "not a whole safetensors file"), ("cut.pth", "not a whole torch file")):
        (tmp_path / name).write_bytes(FILE.read_bytes()[:1000])
        with pytest.raises(CheckpointError, match=sentence):
            with_tiny_decoder(checkpoint, tmp_path / name)
