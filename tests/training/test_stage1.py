"""Diffusion forcing block by block against one pass over all tokens under an explicit mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from live_avatar.model import rope
from live_avatar.model.attention import rotate
from live_avatar.model.dit import KV, CausalDiT, unpatchify
from live_avatar.model.schedule import make_schedule
from tests.training.conftest import SMALL, differing, drawn_clip, drawn_network, gradients
from training.encoded import EncodedClip
from training.flow import timestep, training_levels
from training.matching import Sample, movement
from training.stage1 import ForcingLoss, draw_levels, forced_velocity
from training.window import Place, Scene, Window

BLOCKS = 7
LEVELS = (0.9, 0.2, 1.0, 0.6, 0.009, 0.4, 0.75)
PLACE = Place(first_block=9, distance=6)
LATE = SMALL.stream.sink_update_block or 0


def visible(late: bool) -> Tensor:
    """Mask [queries, keys]: keys are all noisy tokens, then for every block both sinks, rolled for that block."""
    stream = SMALL.stream
    query, key = torch.arange(BLOCKS)[:, None], torch.arange(BLOCKS)[None]
    noisy = (key <= query) & (key > query - stream.window_blocks)
    replaced = late & (query >= LATE - 1)
    early_sink, late_sink = (key == query) & ~replaced, (key == query) & replaced
    columns = [(noisy, stream.block_tokens), (early_sink, stream.sink_tokens), (late_sink, stream.sink_tokens)]
    rows = torch.cat([part.repeat_interleave(tokens, dim=1) for part, tokens in columns], dim=1)
    return rows.repeat_interleave(stream.block_tokens, dim=0)


def phase_of(frames: Tensor, sink: bool = False) -> Tensor:
    height, width = SMALL.stream.latent_height, SMALL.stream.latent_width
    grid = rope.frame_grid(height, width, frames.numpy())
    if sink:
        grid = rope.concatenate(grid, rope.motion_grid(height, width))
    return torch.from_numpy(grid.phase(SMALL.dit.head_dim))


def not_rotated(key: Tensor) -> Tensor:
    """Keys of the sink as they were before the prefill rotated them."""
    cosine, sine = phase_of(torch.tensor([rope.REFERENCE_POSITION]), sink=True)
    return rotate(key, torch.stack([cosine, -sine]))


def masked_velocity(dit: CausalDiT, scene: Scene, noisy: Tensor) -> Tensor:
    """Velocity [1, 16, F, h, w] of all blocks in one pass from the same layers."""
    stream, eps, size = SMALL.stream, SMALL.dit.eps, SMALL.stream.frames_per_block
    first = PLACE.first_block * size
    phase = phase_of(torch.arange(first, first + BLOCKS * size))
    positions = [rope.sink_position(first + block * size, PLACE.distance) for block in range(BLOCKS)]
    rolled = [phase_of(torch.tensor([position]), sink=True) for position in positions]
    tokens = stream.block_tokens
    modulations = [dit.modulation(timestep(level)) for level in LEVELS]
    heads = torch.stack([m.head for m in modulations], dim=1).repeat_interleave(tokens, dim=1)  # [2, L, C]
    mask = visible(bool(scene.late_sink))
    x = dit.noisy_tokens(noisy, None)
    for layer, block in enumerate(dit.layers):
        rows = torch.stack([m.layers[layer] for m in modulations], dim=1).repeat_interleave(tokens, dim=1)  # [6, L, C]
        shift1, scale1, gate1, shift2, scale2, gate2 = rows
        normed = F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale1) + shift1
        key, value = block.self_attn.key_value(normed)
        sinks: KV = [scene.sink[layer], (scene.late_sink or scene.sink)[layer]]
        keys = torch.cat([rotate(key, phase), *(rotate(not_rotated(k), at) for k, _ in sinks for at in rolled)], dim=2)
        values = torch.cat([value, *(v for _, v in sinks for _ in rolled)], dim=2)
        query = rotate(block.self_attn.query(normed), phase)
        seen = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        x = x + gate1 * block.self_attn.o(seen.transpose(1, 2).flatten(2))
        x = x + block.cross_attn(block.cross_attn.query(block.norm3(x)), *scene.text[layer])
        x = x + gate2 * block.ffn(F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale2) + shift2)
        x = dit.audio_injector(layer, x, scene.audio(0, BLOCKS * size))
    return unpatchify(dit.head(x, heads), noisy.shape)


@pytest.fixture(scope="module")
def dit() -> CausalDiT:
    return drawn_network()


@pytest.fixture(scope="module")
def clip() -> EncodedClip:
    return drawn_clip(BLOCKS)


@pytest.mark.parametrize("replaced", [False, True])
def test_blocks_in_order_are_one_masked_pass_with_its_gradients(
    dit: CausalDiT, clip: EncodedClip, replaced: bool
) -> None:
    window = Window(SMALL, BLOCKS)
    late = clip.latents[:, :, :1] if replaced else None
    probe = torch.randn(clip.latents.shape, generator=torch.Generator().manual_seed(0))
    found = {}
    for name in ("blocks", "masked"):
        dit.zero_grad()
        scene = window.open(dit, clip, late)
        if name == "blocks":
            velocity = forced_velocity(dit, window, scene, PLACE, window.blocks_of(clip.latents), LEVELS)
        else:
            velocity = masked_velocity(dit, scene, clip.latents)
        (velocity * probe).mean().backward()
        found[name] = {"velocity": velocity.detach(), **gradients(dit)}
    assert differing(found["blocks"], found["masked"]) == []


def test_a_block_is_denoised_by_the_past_at_its_level(dit: CausalDiT, clip: EncodedClip) -> None:
    """The level of a block changes itself and the later blocks, and no earlier one."""
    window = Window(SMALL, BLOCKS)
    blocks = window.blocks_of(clip.latents)
    with torch.no_grad():
        scene = window.open(dit, clip)
        one = forced_velocity(dit, window, scene, PLACE, blocks, LEVELS)
        other = forced_velocity(dit, window, scene, PLACE, blocks, [*LEVELS[:3], 0.1, *LEVELS[4:]])
    pairs = zip(window.blocks_of(one), window.blocks_of(other), strict=True)
    assert [torch.equal(a, b) for a, b in pairs] == [True] * 3 + [False] * 4


def test_levels_are_independent_or_even_and_often_the_schedules(draw: torch.Generator) -> None:
    schedule, fine = set(make_schedule(SMALL.stream).sigmas), set(training_levels(SMALL.stream))
    drawn = [draw_levels(SMALL.stream, 5, draw) for _ in range(1000)]
    assert all(len(levels) == 5 and set(levels) <= schedule | fine for levels in drawn)
    even = [len(set(levels)) == 1 for levels in drawn]
    scheduled = [set(levels) <= schedule for levels in drawn]
    assert 0.45 < sum(even) / 1000 < 0.57
    assert 0.45 < sum(scheduled) / 1000 < 0.57
    assert len({levels[0] for levels in drawn}) > 300


def test_the_same_draws_give_the_same_loss_and_no_speech_another(dit: CausalDiT, clip: EncodedClip) -> None:
    loss = ForcingLoss(Window(SMALL, BLOCKS), movement([clip], 0.5), far_share=0.5)

    def value(spoken: bool) -> float:
        draw = torch.Generator().manual_seed(4)
        return loss(dit, Sample(clip, 0, draw), draw, spoken).item()

    assert value(True) == value(True)
    assert value(True) != value(False)
