"""Pose latents, two speakers, and the frame packer on other lengths (golden `dit_extra`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from live_avatar.model import rope
from live_avatar.model.audio import AudioTokens
from live_avatar.model.dit import CausalDiT
from tests.golden.conftest import Golden
from tests.golden.trace import Geometry, Trace, audio_tokens, prefill
from tests.tolerances import PORT


@pytest.fixture
def trace(dit: CausalDiT, dit_step: Golden, golden_config: dict[str, Any]) -> Trace:
    geometry = Geometry.of(golden_config, dit)
    text, sink = prefill(
        dit, geometry, dit_step["in/context"], dit_step["in/ref_latents"], dit_step["in/motion_latents"]
    )
    return Trace(dit, geometry, float(dit_step["in/timestep"][0, 0]), text, sink)


def test_pose(trace: Trace, dit: CausalDiT, dit_step: Golden, dit_extra: Golden) -> None:
    audio = audio_tokens(dit, dit_step["in/audio"][0, :, :, :12])
    velocity = trace.run(0, dit_step["in/noise/block0"][None], audio, 30, dit_extra["pose/in/cond_states"])
    dit_extra.check("pose/velocity/block0", velocity, PORT)


def test_two_speakers(trace: Trace, dit: CausalDiT, dit_step: Golden, dit_extra: Golden) -> None:
    speakers = [audio_tokens(dit, states) for states in dit_extra["actors/in/audio"]]
    frames = trace.geometry.frames
    weight = dit_extra["actors/in/mask"][:, :frames].flatten(1, 3)  # quirk Q20: always the first three frames
    audio = AudioTokens(torch.cat([s.local for s in speakers]), torch.cat([s.global_tokens for s in speakers]), weight)
    velocity = trace.run(0, dit_step["in/noise/block0"][None], audio, 30)
    dit_extra.check("actors/velocity/block0", velocity, PORT)


def test_frame_packer(dit: CausalDiT, dit_extra: Golden, golden_config: dict[str, Any]) -> None:
    run = golden_config["run"]
    phase = rope.motion_grid(run["lat_h"], run["lat_w"]).phase(dit.config.head_dim)
    dit_extra.check("framepack/rope_cos", phase[0], PORT)
    dit_extra.check("framepack/rope_sin", phase[1], PORT)
    counts = [key.split("/")[-1] for key in dit_extra.keys if key.startswith("framepack/in/")]
    assert counts
    for count in counts:
        tokens = dit.frame_packer(dit_extra[f"framepack/in/{count}"])
        dit_extra.check(f"framepack/tokens/{count}", tokens, PORT)
