"""The tiny decoder's stage: it learns the frozen VAE's frames, and its file is one that the export takes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from live_avatar.assets import TINY_WEIGHTS
from live_avatar.config import TAEConfig
from live_avatar.weights.checkpoint import load_networks, open_checkpoint
from live_avatar.weights.tiny_decoder import with_tiny_decoder
from tests.tolerances import STREAMED
from tests.training.conftest import SMALL, toy_config
from training.checkpoints import save_weights
from training.config import DecoderStage
from training.data.clips import Split, make_clip
from training.decoder import FILE, DecoderTraining, decoded, fresh_tae, make_stage
from training.encoded import ENCODERS, pixels
from training.reconstruction import CLIP_BLOCKS, mouth_surroundings
from training.vae import Streams, fresh_vae, reconstruct

SIDE = SMALL.stream.height
CONFIG = TAEConfig((16, 8, 8, 8))


@pytest.fixture
def stage(tmp_path: Path, small: None, draw: torch.Generator) -> DecoderTraining:
    path = tmp_path / ENCODERS["vae"]
    path.parent.mkdir()
    save_weights(path, fresh_vae(SMALL.vae, draw).state_dict())
    return make_stage(toy_config(), tmp_path)


@torch.no_grad()
def test_a_fresh_decoder_gives_each_latent_as_four_equal_frames(draw: torch.Generator) -> None:
    latents = torch.randn(1, 16, 3, 4, 4, generator=draw)
    frames = decoded(fresh_tae(CONFIG, draw), latents)
    assert frames.shape == (1, 3, 9, 32, 32)
    of_two, of_three = frames[:, :, 1:5], frames[:, :, 5:]
    assert torch.equal(of_two, of_two[:, :, :1].expand_as(of_two))
    assert not torch.equal(of_two, of_three)


@torch.no_grad()
def test_a_step_learns_the_vaes_frames_of_noisy_latents(stage: DecoderTraining, draw: torch.Generator) -> None:
    clip = make_clip(Split.TRAIN, 0, 1, SIDE)
    video = pixels(clip.frames[:9])
    vae = stage._vae
    whole = reconstruct(vae, video, Streams())[1]
    noise = [(stage._lesson(video, draw)[1] - whole).std() for _ in range(8)]
    assert 0.1 < max(noise) < 0.35, "its deviation is drawn up to 0.3"
    assert min(noise) < 0.1
    frames, latents = stage._lesson(video, draw)
    assert (frames.shape, latents.shape) == ((1, 3, 9, SIDE, SIDE), (1, 16, 3, SIDE // 8, SIDE // 8))
    first, state = vae.decode(latents[:, :, :1], None)
    expected = torch.cat([first, vae.decode(latents[:, :, 1:], state)[0]], dim=2).clamp(-1, 1)
    assert (frames - expected).abs().mean() < 0.25 * expected.abs().mean(), "but for bfloat16"


def test_a_step_has_whole_pictures_and_mouths_and_leaves_the_vae(stage: DecoderTraining) -> None:
    before = {name: one.clone() for name, one in stage._vae.named_parameters()}
    seen = []
    lesson = stage._lesson
    stage._lesson = lambda video, draw: seen.append(tuple(video.shape[2:])) or lesson(video, draw)  # type: ignore[method-assign]
    stage.step(1)
    rows, columns = mouth_surroundings(SIDE)
    mouth = (rows.stop - rows.start, columns.stop - columns.start)
    assert seen == [(5, SIDE, SIDE), (1 + 12 * CLIP_BLOCKS, *mouth)]
    assert all(torch.equal(one, before[name]) for name, one in stage._vae.named_parameters())
    assert all(not one.requires_grad for one in stage._vae.parameters())


@pytest.mark.slow
def test_it_learns_the_shipped_vaes_frames(tmp_path: Path) -> None:
    (tmp_path / ENCODERS["vae"]).parent.mkdir()
    shutil.copy(TINY_WEIGHTS / "vae.safetensors", tmp_path / ENCODERS["vae"])
    stage = make_stage(toy_config(preset="tiny", decoder=DecoderStage(30, 1, 1e-3, frames=5)), tmp_path)
    for group in stage.optimizers["tae"].param_groups:
        group["lr"] = 3e-3
    video = pixels(make_clip(Split.VALIDATION, 0, 1).frames[:9])
    with torch.no_grad():
        frames, latents = reconstruct(stage._vae, video, Streams())

    @torch.no_grad()
    def error() -> float:
        return float((decoded(stage._tae, latents) - frames).abs().mean())

    before = error()
    for number in range(1, 31):
        stage.step(number)
    assert error() < 0.7 * before


@torch.no_grad()
def test_the_export_takes_its_file(stage: DecoderTraining, tmp_path: Path, draw: torch.Generator) -> None:
    (network,) = stage.outputs().values()
    (tmp_path / FILE).parent.mkdir()
    save_weights(tmp_path / FILE, network.state_dict())
    taken = load_networks(with_tiny_decoder(open_checkpoint(SMALL), tmp_path / FILE)).tae
    latents = torch.randn(1, 16, 3, 4, 4, generator=draw)
    assert taken is not None
    assert (decoded(taken, latents) - decoded(network, latents)).abs().max() <= STREAMED  # type: ignore[arg-type]
