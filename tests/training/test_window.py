"""Windows of a stream: where they stand, and what a pass over one sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from live_avatar.model import rope
from live_avatar.model.audio import AudioTokens
from live_avatar.model.dit import CausalDiT, Conditions
from tests.tolerances import STREAMED
from tests.training.conftest import SMALL, drawn_clip, drawn_network
from training.encoded import EncodedClip
from training.window import FAR_HOURS, Place, Window, draw_place, part, unspoken

BLOCKS = 5
PLACE = Place(first_block=2, distance=17)
LEVEL = 0.7


@pytest.fixture(scope="module")
def dit() -> CausalDiT:
    return drawn_network().requires_grad_(False)


@pytest.fixture(scope="module")
def clip() -> EncodedClip:
    return drawn_clip(BLOCKS)


@pytest.fixture(scope="module")
def window() -> Window:
    return Window(SMALL, BLOCKS)


def whole(dit: CausalDiT, window: Window, clip: EncodedClip, place: Place = PLACE) -> Tensor:
    return window.whole(dit, window.open(dit, clip), place, clip.latents, LEVEL)


def changed(one: Tensor, other: Tensor) -> list[bool]:
    """By latent frame."""
    return [not torch.equal(a, b) for a, b in zip(one.unbind(2), other.unbind(2), strict=True)]


def test_the_teachers_pass_is_the_network_over_all_frames_at_once(
    dit: CausalDiT, window: Window, clip: EncodedClip
) -> None:
    stream, head_dim = SMALL.stream, SMALL.dit.head_dim
    frames = np.arange(6, 6 + 3 * BLOCKS)
    grid = rope.frame_grid(stream.latent_height, stream.latent_width, frames)
    motion = rope.motion_grid(stream.latent_height, stream.latent_width)

    def sink_phase(position: int) -> Tensor:
        reference = rope.frame_grid(stream.latent_height, stream.latent_width, np.array([position]))
        return torch.from_numpy(rope.concatenate(reference, motion).phase(head_dim))

    text = dit.text_kv(clip.text)
    sink = dit.prefill(clip.reference, clip.motion, text, dit.modulation(0.0), sink_phase(30))
    audio = [dit.casual_audio_encoder(states) for states in clip.states]
    tokens = AudioTokens(torch.cat([a for a, _ in audio])[None], torch.cat([b for _, b in audio])[None])
    expected, _ = dit.denoise(
        clip.latents,
        Conditions(text, sink, (), tokens),
        dit.modulation(700.0),
        torch.from_numpy(grid.phase(head_dim)),
        torch.from_numpy(rope.TokenPhases(stream, head_dim).sink_turn(30)),  # 6 + 17 is less
    )
    ours = whole(dit, window, clip)
    assert (ours - expected).abs().max() <= STREAMED * expected.abs().max()


def test_every_frame_of_the_teacher_sees_every_other(dit: CausalDiT, window: Window, clip: EncodedClip) -> None:
    latents = clip.latents.clone()
    latents[:, :, -1] += 1
    other = window.whole(dit, window.open(dit, clip), PLACE, latents, LEVEL)
    assert all(changed(whole(dit, window, clip), other))


def test_the_sink_keeps_its_distance_unless_it_does_not_roll(dit: CausalDiT, clip: EncodedClip) -> None:
    far = Place(first_block=1000, distance=17)
    for rolls in (True, False):
        window = Window(SMALL, BLOCKS, rolls=rolls)
        near, moved = whole(dit, window, clip), whole(dit, window, clip, far)
        nearer = whole(dit, window, clip, Place(1000, 16))
        assert all(changed(near, moved))
        assert all(changed(moved, nearer)) == rolls


def test_only_position_tells_a_reference_that_rolls_along(dit: CausalDiT, clip: EncodedClip) -> None:
    """Without motion tokens, a window at any time is the same to the network: only differences of positions count."""
    window = Window(SMALL, BLOCKS)
    scene = window.open(dit, clip)
    reference = [
        (key[:, :, : SMALL.stream.frame_tokens], value[:, :, : SMALL.stream.frame_tokens]) for key, value in scene.sink
    ]
    window._phases._motion = window._phases._motion[:, :0]
    alone = scene._replace(sink=reference)
    near, far = (window.whole(dit, alone, Place(first, 17), clip.latents, LEVEL) for first in (10, 70_000))
    assert (near - far).abs().max() <= STREAMED * near.abs().max()


def test_part_cuts_speech_and_video_alike(clip: EncodedClip) -> None:
    cut = part(clip, 1, 2)
    assert torch.equal(cut.states, clip.states[1:3])
    assert torch.equal(cut.latents, clip.latents[:, :, 3:9])
    assert torch.equal(cut.motion, clip.motion)


def test_a_clip_without_speech_is_not_a_clip_of_silence(clip: EncodedClip) -> None:
    assert not unspoken(clip).states.any()
    assert clip.states.any()


def test_places_are_near_or_at_any_scale_of_time(draw: torch.Generator) -> None:
    stream = SMALL.stream
    places = [draw_place(1, 0.5, stream, draw) for _ in range(2000)]
    far = [place.first_block for place in places if place.first_block != 1]
    assert 900 < len(far) < 1100
    limit = FAR_HOURS * 3600 / 0.48
    assert all(0 <= first <= limit for first in far)
    below = sum(first < limit**0.5 for first in far) / len(far)
    assert 0.4 < below < 0.6
    assert {place.distance for place in places} == set(range(4, 31))
    assert all(draw_place(1, 0.0, stream, draw).first_block == 1 for _ in range(20))
