"""The VAE stage: it learns, and its latents are brought to scale without a change of its pictures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.tolerances import STREAMED
from tests.training.conftest import SMALL, toy_config
from training import vae as vae_stage
from training.data.clips import Clip, Split, make_clip
from training.encoded import pixels
from training.vae import (
    CLIP_BLOCKS,
    Streams,
    VAETraining,
    draw_video,
    fold,
    fresh_vae,
    mouth_region,
    psnr,
    reconstruct,
)

SIDE = SMALL.stream.height


@pytest.fixture(scope="module")
def clip() -> Clip:
    return make_clip(Split.TRAIN, 0, CLIP_BLOCKS, SIDE)


@torch.no_grad()
def test_folding_changes_latents_as_told_and_no_picture(clip: Clip, draw: torch.Generator) -> None:
    """Compared as a whole: where a fresh decoder's activations are near 0, its norms blow up single roundings."""
    vae = fresh_vae(SMALL.vae, draw).double()
    video = pixels(np.concatenate([clip.picture[None], clip.frames[:12]])).double()
    before, latents = reconstruct(vae, video, Streams())
    mean = torch.randn(16, generator=draw).double()
    deviation = 0.1 + torch.rand(16, generator=draw).double()
    fold(vae, mean, deviation)
    after, folded = reconstruct(vae, video, Streams())
    assert psnr(after, before) > 100
    columns = (16, 1, 1, 1)
    expected = (latents - mean.reshape(columns)) / deviation.reshape(columns)
    assert (folded - expected).abs().max() <= STREAMED * expected.abs().max()


@pytest.mark.usefixtures("small")
def test_the_product_has_latents_of_mean_0_and_deviation_1() -> None:
    stage = VAETraining(toy_config())
    vae = stage.products()["vae"]
    clips = [make_clip(Split.TRAIN, seed, CLIP_BLOCKS, SIDE) for seed in range(vae_stage.STATISTICS_CLIPS)]
    videos = [pixels(np.concatenate([np.repeat(clip.picture[None], 25, axis=0), clip.frames])) for clip in clips]
    with torch.no_grad():
        latents = torch.cat([reconstruct(vae, video, Streams())[1] for video in videos], dim=2)  # type: ignore[arg-type]
    assert latents.mean((0, 2, 3, 4)).abs().max() <= STREAMED * latents.abs().max()
    assert latents.std((0, 2, 3, 4)) == pytest.approx(torch.ones(16), abs=1e-3)


@torch.no_grad()
def test_a_stream_in_pieces_is_the_stream_at_once(clip: Clip, draw: torch.Generator) -> None:
    vae = fresh_vae(SMALL.vae, draw)
    video = pixels(np.concatenate([clip.picture[None], clip.frames[:16]]))
    whole, latents = reconstruct(vae, video, Streams())
    streams = Streams()
    pieces = [reconstruct(vae, piece, streams) for piece in video.split([9, 8], dim=2)]
    frames, parts = (torch.cat(one, dim=2) for one in zip(*pieces, strict=True))
    assert (parts - latents).abs().max() <= STREAMED * latents.abs().max()
    assert (frames - whole).abs().max() <= STREAMED * whole.abs().max()


@pytest.mark.usefixtures("small")
def test_the_stage_learns() -> None:
    config = toy_config()
    stage = VAETraining(replace(config, vae=replace(config.vae, batch=2)))
    for group in stage.optimizers["vae"].param_groups:
        group["lr"] = 3e-3
    before = stage.validate()
    losses = [stage.step(number)["loss"] for number in range(1, 11)]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert stage.validate()["psnr"] > before["psnr"] + 1


def test_videos_begin_with_the_picture_or_anywhere(clip: Clip, draw: torch.Generator) -> None:
    videos = [draw_video(clip, 5, draw) for _ in range(40)]
    assert {tuple(video.shape) for video in videos} == {(1, 3, 5, SIDE, SIDE)}
    still = pixels(clip.picture[None])
    starts = [torch.equal(video[:, :, :1], still) for video in videos]
    assert 8 < sum(starts) < 32
    whole = pixels(clip.frames)
    follows = [torch.equal(video[:, :, 1:], whole[:, :, :4]) for video in videos]
    assert all(continued for continued, first in zip(follows, starts, strict=True) if first)
    assert not all(follows)


def test_the_mouth_region_holds_all_that_the_mouth_moves(clip: Clip) -> None:
    rows, columns = mouth_region(SIDE)
    moves = clip.frames.astype(float).var(axis=0).sum(-1)
    assert moves[rows, columns].sum() > 0.2 * moves.sum()
    assert moves[rows, columns].size < 0.12 * moves.size


def test_psnr_is_that_of_pixels_from_minus_1_to_1() -> None:
    black, white = -torch.ones(2, 2), torch.ones(2, 2)
    assert psnr(black, white) == 0.0
    assert psnr(black, black + 0.02) == pytest.approx(40.0, abs=1e-3)
