"""Passes that leave out what nobody needs give what the whole stream gives, and leave it out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from live_avatar.config import MOTION_LATENTS, TINY, TAEConfig, VAEConfig
from live_avatar.model.streaming import StreamingDecoder, Temporal, frames_needed
from live_avatar.model.tae import TAE
from live_avatar.model.vae import VAE
from tests.support.networks import randomised
from tests.tolerances import STREAMED

SIDE = 4  # latent pixels
SMALL_TAE = TAEConfig(channels=(16, 12, 8, 8))
WARM_UP = TINY.stream.decoder_warmup_latents


def made_vae(config: VAEConfig = TINY.vae) -> VAE:
    model = VAE(config)
    randomised(model)
    return model.eval()


def made_tae() -> TAE:
    model = TAE(SMALL_TAE)
    randomised(model)
    return model.eval()


def operations(run: Callable[[], object]) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def relative(ours: Tensor, expected: Tensor) -> float:
    return float((ours - expected).abs().max() / expected.abs().max())


def of_repeated_frames(vae: VAE, picture: Tensor, latents: int) -> Tensor:
    latent, state = vae.encode(picture, None)
    made = [latent]
    for _ in range(latents - 1):
        latent, state = vae.encode(picture.expand(-1, -1, 4, -1, -1), state)
        made.append(latent)
    return torch.cat(made, dim=2)


def of_decoded_latents(decoder: StreamingDecoder, latents: Tensor) -> list[Tensor]:
    _, state = decoder.decode(latents[:, :, :1], None)
    return decoder.decode(latents[:, :, 1:], state)[1] if latents.shape[2] > 1 else state


@pytest.fixture
def picture() -> Tensor:
    return torch.rand(1, 3, 1, 8 * SIDE, 8 * SIDE, generator=torch.Generator().manual_seed(2)) * 2 - 1


@pytest.fixture
def latents() -> Tensor:
    return torch.randn(1, 16, MOTION_LATENTS, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("count", [1, 2, 3, 7, MOTION_LATENTS, 40])
@pytest.mark.parametrize(
    "config",
    [
        TINY.vae,
        replace(TINY.vae, num_res_blocks=1),  # its features settle before the 19th latent
        replace(TINY.vae, temporal_downsample=(True, True, False)),
    ],
)
def test_a_still_picture_gives_the_latents_of_its_repeated_frames(
    picture: Tensor, config: VAEConfig, count: int
) -> None:
    vae = made_vae(config)
    with torch.no_grad():
        ours, expected = vae.encode_still(picture, count), of_repeated_frames(vae, picture, count)
    assert ours.shape == (1, 16, count, SIDE, SIDE)
    assert relative(ours, expected) <= STREAMED


def test_latents_of_a_still_picture_differ_up_to_the_last(picture: Tensor) -> None:
    """Otherwise the first would do for all, and the test above would see no difference."""
    made = made_vae().encode_still(picture, MOTION_LATENTS)[0].unbind(1)
    assert all(not torch.equal(a, b) for a, b in pairwise(made))


@pytest.mark.parametrize("make", [made_vae, made_tae])
@pytest.mark.parametrize("count", [1, 2, 4, WARM_UP, MOTION_LATENTS])
def test_a_warm_up_leaves_the_state_of_decoding_it(
    latents: Tensor, make: Callable[[], StreamingDecoder], count: int
) -> None:
    decoder, given = make(), latents[:, :, :count]
    with torch.no_grad():
        ours, expected = decoder.warm_up(given), of_decoded_latents(decoder, given)
        later = latents[:, :, -3:].flip(2)
        frames, _ = decoder.decode(later, ours)
        expected_frames, _ = decoder.decode(later, expected)
    assert [slot.shape for slot in ours] == [slot.shape for slot in expected]
    assert all(relative(a, b) <= STREAMED if b.any() else not a.any() for a, b in zip(ours, expected, strict=True))
    assert relative(frames, expected_frames) <= STREAMED


def test_a_still_picture_takes_a_quarter_of_the_work(picture: Tensor) -> None:
    vae = made_vae()
    whole = operations(lambda: of_repeated_frames(vae, picture, MOTION_LATENTS))
    assert operations(lambda: vae.encode_still(picture, MOTION_LATENTS)) < 0.3 * whole


@pytest.mark.parametrize(("make", "share"), [(made_vae, 0.75), (made_tae, 0.5)])
def test_a_warm_up_leaves_work_out(latents: Tensor, make: Callable[[], StreamingDecoder], share: float) -> None:
    decoder, given = make(), latents[:, :, :WARM_UP]
    whole = operations(lambda: of_decoded_latents(decoder, given))
    assert operations(lambda: decoder.warm_up(given)) < share * whole


def test_frames_that_each_layer_must_make() -> None:
    def layer(history: int, growth: int = 1) -> Temporal:
        made = Temporal()
        made.history, made.growth = history, growth
        return made

    # The last one makes 2 frames of 4. They are 2 pairs, so the growing layer runs on 2 frames, which it makes of 4.
    assert frames_needed([layer(2), layer(2, growth=2), layer(0), layer(2)]) == [4, 2, 2]
    assert frames_needed([]) == []
