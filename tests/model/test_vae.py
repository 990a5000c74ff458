"""The VAE as streams: any cutting gives the same, streams share nothing, slots are as the contract says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from live_avatar.config import S2V_14B, TINY
from live_avatar.graphs.contract import decoder_state_shapes
from live_avatar.model.vae import VAE
from tests.support.networks import randomised
from tests.tolerances import STREAMED

SIDE = 4  # latent pixels
LATENTS = 9
FRAMES = 1 + 4 * (LATENTS - 1)

Pass = Callable[[Tensor, Sequence[Tensor] | None], tuple[Tensor, list[Tensor]]]


@pytest.fixture(scope="module")
def vae() -> VAE:
    model = VAE(TINY.vae)
    randomised(model)
    return model


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return torch.randn(1, 16, LATENTS, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def frames() -> Tensor:
    return torch.rand(1, 3, FRAMES, 8 * SIDE, 8 * SIDE, generator=torch.Generator().manual_seed(2)) * 2 - 1


def in_pieces(run: Pass, x: Tensor, sizes: list[int]) -> tuple[Tensor, list[Tensor]]:
    """x cut along time into pieces of the given sizes, each with the state of the one before."""
    made, state = [], None
    for piece in x.split(sizes, dim=2):
        out, state = run(piece, state)
        made.append(out)
    assert state is not None
    return torch.cat(made, dim=2), state


def relative(ours: Tensor, expected: Tensor) -> float:
    return float((ours - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("sizes", [[1, 2, 6], [LATENTS], [3, 3, 1, 2], [1] * LATENTS])
def test_latents_decode_alike_however_they_are_cut(vae: VAE, latents: Tensor, sizes: list[int]) -> None:
    expected, expected_state = in_pieces(vae.decode, latents, [1, LATENTS - 1])
    ours, state = in_pieces(vae.decode, latents, sizes)
    assert ours.shape == (1, 3, FRAMES, 8 * SIDE, 8 * SIDE)
    assert relative(ours, expected) <= STREAMED
    for slot, expected_slot in zip(state, expected_state, strict=True):
        assert relative(slot, expected_slot) <= STREAMED


@pytest.mark.parametrize("sizes", [[1, 8, 24], [FRAMES], [9, 12, 12], [1] + [4] * (LATENTS - 1)])
def test_frames_encode_alike_however_they_are_cut(vae: VAE, frames: Tensor, sizes: list[int]) -> None:
    expected, expected_state = in_pieces(vae.encode, frames, [1, FRAMES - 1])
    ours, state = in_pieces(vae.encode, frames, sizes)
    assert ours.shape == (1, 16, LATENTS, SIDE, SIDE)
    assert relative(ours, expected) <= STREAMED
    for slot, expected_slot in zip(state, expected_state, strict=True):
        assert relative(slot, expected_slot) <= STREAMED


def test_the_past_matters(vae: VAE, latents: Tensor) -> None:
    """Without this, a decoder that forgot everything would pass the tests above."""
    _, state = vae.decode(latents[:, :, :1], None)
    _, other = vae.decode(latents[:, :, 5:6], None)
    after, _ = vae.decode(latents[:, :, 1:2], state)
    after_other, _ = vae.decode(latents[:, :, 1:2], other)
    assert relative(after, after_other) > 100 * STREAMED


def test_a_later_latent_changes_no_earlier_frame(vae: VAE, latents: Tensor) -> None:
    changed = latents.clone()
    changed[:, :, 6] = 0
    before, _ = in_pieces(vae.decode, latents, [1, LATENTS - 1])
    after, _ = in_pieces(vae.decode, changed, [1, LATENTS - 1])
    same = [torch.equal(before[:, :, i], after[:, :, i]) for i in range(FRAMES)]
    assert same == [i < 1 + 4 * 5 for i in range(FRAMES)]


def test_two_interleaved_streams_on_one_vae_do_not_meet(vae: VAE, latents: Tensor, frames: Tensor) -> None:
    streams = [latents, latents.flip(2)]
    alone = [in_pieces(vae.decode, x, [1] * LATENTS)[0] for x in streams]
    states: list[list[Tensor] | None] = [None, None]
    together: list[list[Tensor]] = [[], []]
    encoded = None
    for i in range(LATENTS):
        for number, x in enumerate(streams):
            out, states[number] = vae.decode(x[:, :, i : i + 1], states[number])
            together[number].append(out)
        start = 0 if i == 0 else 4 * i - 3
        _, encoded = vae.encode(frames[:, :, start : 4 * i + 1], encoded)  # encoding between them is no matter either
    for expected, pieces in zip(alone, together, strict=True):
        assert torch.equal(torch.cat(pieces, dim=2), expected)


def test_a_call_leaves_the_state_it_was_given(vae: VAE, latents: Tensor) -> None:
    _, state = vae.decode(latents[:, :, :1], None)
    before = [slot.clone() for slot in state]
    first, _ = vae.decode(latents[:, :, 1:4], state)
    again, _ = vae.decode(latents[:, :, 1:4], state)
    assert torch.equal(first, again)
    assert all(torch.equal(slot, kept) for slot, kept in zip(state, before, strict=True))


def test_slots_have_the_contracts_shapes_from_the_first_call_on(vae: VAE, latents: Tensor) -> None:
    shapes = decoder_state_shapes(TINY.vae, SIDE, SIDE)
    assert len(shapes) == 32
    _, state = vae.decode(latents[:, :, :1], None)
    assert tuple(tuple(slot.shape) for slot in state) == shapes
    for _ in range(2):
        _, state = vae.decode(latents[:, :, 1:4], state)
        assert tuple(tuple(slot.shape) for slot in state) == shapes


def test_time_resampling_remembers_the_first_frame_when_encoding_and_not_when_decoding(
    vae: VAE, latents: Tensor, frames: Tensor
) -> None:
    _, encoder = vae.encode(frames[:, :, :1], None)
    assert [i for i, slot in enumerate(encoder) if slot.shape[0] == 1] == [9, 14]
    assert all(slot[-1].any() for slot in encoder)
    _, decoder = vae.decode(latents[:, :, :1], None)
    assert [i for i, slot in enumerate(decoder) if not slot.any()] == [11, 18]  # spec section 13
    assert all(not slot[0].any() for slot in decoder)


def test_the_14b_decoder_keeps_what_the_spec_says() -> None:
    shapes = decoder_state_shapes(S2V_14B.vae, SIDE, SIDE)
    assert sum(torch.Size(shape).numel() for shape in shapes) == 151_328 * SIDE * SIDE  # spec section 13
