"""The transformer as a stream: cached equals full attention, the future changes nothing, the window ends."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from live_avatar.config import MOTION_LATENTS, Preset
from live_avatar.graphs.contract import kv_names
from live_avatar.model import rope
from live_avatar.model.attention import rotate
from live_avatar.model.audio import AudioTokens
from live_avatar.model.dit import KV, CausalDiT, Conditions, Modulation, unpatchify
from live_avatar.pipeline.kv_cache import KVRing
from live_avatar.runtime.host import host_zeros
from tests.support.networks import SMALL, randomised
from tests.tolerances import STREAMED

BLOCKS = 7
TIMESTEP = 857.7


def preset_of(layers: int) -> Preset:
    injected = tuple(layer for layer in (0, 2) if layer < layers)
    return replace(SMALL, dit=replace(SMALL.dit, num_layers=layers, audio_inject_layers=injected))


def largest_relative_error(ours: Tensor, expected: Tensor) -> float:
    return float((ours - expected).abs().max() / expected.abs().max())


@dataclass
class Session:
    """A network, the inputs of its blocks, and its sink."""

    preset: Preset
    dit: CausalDiT
    modulation: Modulation
    latents: list[Tensor]
    audio: list[AudioTokens]
    text: KV
    sink: KV

    @classmethod
    def of(cls, layers: int) -> Session:
        preset, draw = preset_of(layers), torch.Generator().manual_seed(11)
        dit, stream, config = CausalDiT(preset.dit), preset.stream, preset.dit
        randomised(dit)
        grid = (stream.latent_height, stream.latent_width)
        latents = [torch.randn(1, *stream.latent_shape, generator=draw) for _ in range(BLOCKS)]
        states = torch.randn(BLOCKS, config.audio_states, config.audio_dim, stream.block_frames, generator=draw)
        audio = [
            AudioTokens(local[None], global_tokens[None])
            for local, global_tokens in map(dit.casual_audio_encoder, states)
        ]
        text = dit.text_kv(torch.randn(config.text_len, config.text_dim, generator=draw))
        reference = torch.randn(1, 16, 1, *grid, generator=draw)
        motion = torch.randn(1, 16, MOTION_LATENTS, *grid, generator=draw)
        session = cls(preset, dit, dit.modulation(TIMESTEP), latents, audio, text, [])
        phase = session.sink_phase(rope.REFERENCE_POSITION)
        session.sink = dit.prefill(reference, motion, text, dit.modulation(0.0), phase)
        return session

    def phase(self, first: int, count: int) -> Tensor:
        """[2, tokens, D/2] of `count` latent frames from `first` on."""
        stream = self.preset.stream
        grid = rope.frame_grid(stream.latent_height, stream.latent_width, np.arange(first, first + count))
        return torch.from_numpy(grid.phase(self.preset.dit.head_dim))

    def sink_phase(self, position: int) -> Tensor:
        height, width = self.preset.stream.latent_height, self.preset.stream.latent_width
        reference = rope.frame_grid(height, width, np.array([position]))
        grid = rope.concatenate(reference, rope.motion_grid(height, width))
        return torch.from_numpy(grid.phase(self.preset.dit.head_dim))

    def position(self, block: int) -> int:
        """Rolled position of the reference."""
        stream = self.preset.stream
        return rope.sink_position(block * stream.frames_per_block, stream.sink_distance)

    def turn(self, block: int) -> Tensor:
        phases = rope.TokenPhases(self.preset.stream, self.preset.dit.head_dim)
        return torch.from_numpy(phases.sink_turn(self.position(block)))

    def rolled(self, key: Tensor, block: int) -> Tensor:
        """Keys of the sink at the rolled positions: those of the prefill undone, and rotated anew."""
        cosine, sine = self.sink_phase(rope.REFERENCE_POSITION)
        return rotate(rotate(key, torch.stack([cosine, -sine])), self.sink_phase(self.position(block)))


def streamed(session: Session) -> list[Tensor]:
    """Velocities of all blocks, one after another through the ring."""
    preset, ring = session.preset, KVRing(session.preset, host_zeros)
    names, frames = kv_names("new", preset.dit.num_layers), preset.stream.frames_per_block
    velocities = []
    for block, (latent, audio) in enumerate(zip(session.latents, session.audio, strict=True)):
        held = [torch.from_numpy(array) for array in ring.history().values()]
        history = list(zip(held[::2], held[1::2], strict=True))
        conditions = Conditions(session.text, session.sink, [history], audio)
        phase = session.phase(block * frames, frames)
        velocity, written = session.dit.denoise(latent, conditions, session.modulation, phase, session.turn(block))
        flat = [tensor.numpy() for pair in written for tensor in pair]
        ring.append(dict(zip(names, flat, strict=True)))
        velocities.append(velocity)
    return velocities


def visible(blocks: int, block_tokens: int, sink_tokens: int, window: int) -> Tensor:
    """Mask [queries, keys]: keys are all noisy tokens, then the sink once per block, rolled for that block."""
    query, key = torch.arange(blocks)[:, None], torch.arange(blocks)[None]
    noisy = (key <= query) & (key > query - window)
    own_sink = key == query
    rows = torch.cat(
        [noisy.repeat_interleave(block_tokens, dim=1), own_sink.repeat_interleave(sink_tokens, dim=1)], dim=1
    )
    return rows.repeat_interleave(block_tokens, dim=0)


def joint(session: Session) -> Tensor:
    """Velocity [1, 16, 3 * BLOCKS, h, w] of all blocks in one pass, from the same layers, under the mask."""
    dit, stream, eps = session.dit, session.preset.stream, session.preset.dit.eps
    latent = torch.cat(session.latents, dim=2)
    audio = AudioTokens(
        torch.cat([a.local for a in session.audio], dim=1), torch.cat([a.global_tokens for a in session.audio], dim=1)
    )
    phase = session.phase(0, latent.shape[2])
    mask = visible(BLOCKS, stream.block_tokens, stream.sink_tokens, stream.window_blocks)
    x = dit.noisy_tokens(latent, None)
    for layer, block in enumerate(dit.layers):
        shift1, scale1, gate1, shift2, scale2, gate2 = session.modulation.layers[layer]
        normed = F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale1) + shift1
        key, value = block.self_attn.key_value(normed)
        sink_key, sink_value = session.sink[layer]
        rolled = [session.rolled(sink_key, block) for block in range(BLOCKS)]
        keys = torch.cat([rotate(key, phase), *rolled], dim=2)
        values = torch.cat([value, *[sink_value] * BLOCKS], dim=2)
        query = rotate(block.self_attn.query(normed), phase)
        seen = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        x = x + gate1 * block.self_attn.o(seen.transpose(1, 2).flatten(2))
        x = x + block.cross_attn(block.cross_attn.query(block.norm3(x)), *session.text[layer])
        x = x + gate2 * block.ffn(F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale2) + shift2)
        x = dit.audio_injector(layer, x, audio)
    return unpatchify(dit.head(x, session.modulation.head), latent.shape)


@pytest.fixture(scope="module")
def session() -> Session:
    return Session.of(layers=3)


@pytest.fixture(scope="module")
def velocities(session: Session) -> list[Tensor]:
    return streamed(session)


def test_blocks_through_the_ring_equal_one_masked_pass(session: Session, velocities: list[Tensor]) -> None:
    expected = joint(session).chunk(BLOCKS, dim=2)
    for block, (ours, full) in enumerate(zip(velocities, expected, strict=True)):
        assert largest_relative_error(ours, full) <= STREAMED, f"block {block}"


@pytest.mark.parametrize("what", ["latents", "audio"])
def test_a_later_block_never_changes_an_earlier_one(session: Session, velocities: list[Tensor], what: str) -> None:
    changed_block = 4
    given = list(getattr(session, what))
    given[changed_block] = given[0]
    others = streamed(replace(session, **{what: given}))
    same = [torch.equal(a, b) for a, b in zip(velocities, others, strict=True)]
    assert same == [block < changed_block for block in range(BLOCKS)]


def test_in_one_layer_a_block_sees_three_past_blocks_and_no_more() -> None:
    shallow = Session.of(layers=1)
    before = streamed(shallow)
    window = shallow.preset.stream.window_blocks
    after = streamed(replace(shallow, latents=[-shallow.latents[0], *shallow.latents[1:]]))
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert same == [block >= window for block in range(BLOCKS)]


def test_over_several_layers_the_past_reaches_further_than_the_window(
    session: Session, velocities: list[Tensor]
) -> None:
    after = streamed(replace(session, latents=[-session.latents[0], *session.latents[1:]]))
    assert not any(torch.equal(a, b) for a, b in zip(velocities, after, strict=True))


def test_audio_is_heard_in_every_latent_frame_of_its_block(session: Session, velocities: list[Tensor]) -> None:
    audio = [AudioTokens(-session.audio[0].local, session.audio[0].global_tokens), *session.audio[1:]]
    changed = streamed(replace(session, audio=audio))[0]
    assert ((changed - velocities[0]).abs().amax(dim=(0, 1, 3, 4)) > STREAMED).all()


def test_the_sinks_place_matters(session: Session, velocities: list[Tensor]) -> None:
    moved = streamed(replace(session, preset=session.preset.with_stream(sink_distance=4)))
    assert torch.equal(velocities[0], streamed(session)[0])
    assert not torch.equal(velocities[1], moved[1])


def test_a_call_changes_nothing_in_the_network(session: Session) -> None:
    before = {name: tensor.clone() for name, tensor in session.dit.state_dict().items()}
    buffers = set(vars(session.dit))
    streamed(session)
    assert set(vars(session.dit)) == buffers
    assert all(torch.equal(tensor, before[name]) for name, tensor in session.dit.state_dict().items())


def test_unpatchify_puts_channels_fastest() -> None:
    height, width, channels = 4, 6, 16
    tokens = torch.arange(2 * 2 * 3 * 64, dtype=torch.float32).reshape(1, -1, 64)
    image = unpatchify(tokens, torch.Size((1, channels, 2, height, width)))
    for frame, row, column, channel in ((0, 0, 0, 0), (1, 3, 5, 15), (1, 2, 1, 7), (0, 1, 4, 3)):
        token = (frame * 2 + row // 2) * 3 + column // 2
        feature = (2 * (row % 2) + column % 2) * channels + channel
        assert image[0, channel, frame, row, column] == tokens[0, token, feature]
