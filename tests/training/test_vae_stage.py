"""The VAE stage: it learns, and its latents are brought to scale without a change of its pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tolerances import STREAMED
from tests.training.conftest import SMALL, toy_config
from training import vae as vae_stage
from training.checkpoints import save_weights
from training.config import TrainingConfig
from training.data.clips import Clip, Split, make_clip
from training.encoded import pixels
from training.reconstruction import CLIP_BLOCKS, draw_video, mouth_region, mouth_surroundings, psnr
from training.vae import (
    VAE_FILE,
    Streams,
    VAETraining,
    fold,
    fresh_vae,
    make_mouth_stage,
    make_stage,
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
    stage = make_stage(toy_config())
    vae = stage.outputs()["vae"]
    clips = [make_clip(Split.TRAIN, seed, CLIP_BLOCKS, SIDE) for seed in range(vae_stage.STATISTICS_CLIPS)]
    videos = [pixels(np.concatenate([np.repeat(clip.picture[None], 25, axis=0), clip.frames])) for clip in clips]
    with torch.no_grad():
        latents = torch.cat([reconstruct(vae, video, Streams())[1] for video in videos], dim=2)  # type: ignore[arg-type]
    assert latents.mean((0, 2, 3, 4)).abs().max() <= STREAMED * latents.abs().max()
    assert latents.std((0, 2, 3, 4)) == pytest.approx(torch.ones(16), abs=1e-3)


@torch.no_grad()
def test_a_stream_in_pieces_is_the_stream_at_once(clip: Clip, draw: torch.Generator) -> None:
    """In double precision: pieces of other lengths take other forms of the convolutions, which round differently."""
    vae = fresh_vae(SMALL.vae, draw).double()
    video = pixels(np.concatenate([clip.picture[None], clip.frames[:16]])).double()
    whole, latents = reconstruct(vae, video, Streams())
    streams = Streams()
    pieces = [reconstruct(vae, piece, streams) for piece in video.split([9, 8], dim=2)]
    frames, parts = (torch.cat(one, dim=2) for one in zip(*pieces, strict=True))
    assert (parts - latents).abs().max() <= STREAMED * latents.abs().max()
    assert (frames - whole).abs().max() <= STREAMED * whole.abs().max()


def first_stage(config: TrainingConfig, out: Path) -> VAETraining:
    return make_stage(replace(config, vae=replace(config.vae, batch=2)))


def mouth_stage(config: TrainingConfig, out: Path) -> VAETraining:
    (out / "vae").mkdir()
    save_weights(out / VAE_FILE, make_stage(config).modules["vae"].state_dict())
    return make_mouth_stage(config, out)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("make", [first_stage, mouth_stage])
def test_the_stages_learn(make: Callable[[TrainingConfig, Path], VAETraining], tmp_path: Path) -> None:
    stage = make(toy_config(), tmp_path)
    for group in stage.optimizers["vae"].param_groups:
        group["lr"] = 3e-3
    before = stage.validate()
    for number in range(1, 11):
        stage.step(number)
    assert stage.validate()["psnr"] > before["psnr"] + 1


@pytest.mark.usefixtures("small")
def test_the_mouth_stage_begins_with_what_the_first_one_left(tmp_path: Path) -> None:
    first = make_stage(toy_config())
    (tmp_path / "vae").mkdir()
    save_weights(tmp_path / VAE_FILE, first.outputs()["vae"].state_dict())
    assert make_mouth_stage(toy_config(), tmp_path).validate() == first.validate()


@pytest.mark.usefixtures("small")
def test_the_mouth_stage_keeps_the_rest_of_the_picture_in_mind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step has a gradient of a piece of a whole picture and one of a whole clip's mouth, as shares of one."""
    stage = mouth_stage(toy_config(), tmp_path)
    seen: list[tuple[list[int], int]] = []
    learn = stage._learn_video

    def noted(video: Tensor, weights: Tensor, draw: torch.Generator, shares: int) -> dict[str, float]:
        assert weights.shape == video.shape[-2:]
        seen.append(([*video.shape], shares))
        return learn(video, weights, draw, shares)

    monkeypatch.setattr(stage, "_learn_video", noted)
    stage.step(1)
    rows, columns = mouth_surroundings(SIDE)
    height, width = rows.stop - rows.start, columns.stop - columns.start
    assert seen == [([1, 3, 5, SIDE, SIDE], 2), ([1, 3, 1 + 12 * CLIP_BLOCKS, height, width], 2)]


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


def test_the_mouths_surroundings_are_the_cells_of_its_latents() -> None:
    for size in (SIDE, 96, 128):
        for outer, inner in zip(mouth_surroundings(size), mouth_region(size), strict=True):
            assert outer.start % 8 == outer.stop % 8 == 0
            assert 0 <= inner.start - outer.start < 8
            assert 0 <= outer.stop - inner.stop < 8


def test_psnr_is_that_of_pixels_from_minus_1_to_1() -> None:
    black, white = -torch.ones(2, 2), torch.ones(2, 2)
    assert psnr(black, white) == 0.0
    assert psnr(black, black + 0.02) == pytest.approx(40.0, abs=1e-3)
