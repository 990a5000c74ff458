"""The tiny decoder, whole and as a stream (golden `tae`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from live_avatar.config import TAEConfig
from live_avatar.model.tae import TAE
from tests.golden.conftest import Golden
from tests.tolerances import FLOAT32


@pytest.fixture(scope="module")
def model(golden_dir: Path) -> TAE:
    values = json.loads((golden_dir / "tae.json").read_text())
    tae = TAE(TAEConfig(tuple(values["channels"]), values["latent_channels"], tuple(values["time_upscale"])))
    tae.load_state_dict(Golden(golden_dir, "tae_weights.safetensors").all())
    return tae.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> Golden:
    return Golden(golden_dir, "tae.safetensors")


@pytest.mark.parametrize("block", [1, 2, 3, 6])
def test_a_stream_gives_the_whole_clip(model: TAE, golden: Golden, block: int) -> None:
    """The official class decodes all latents at once; here in blocks of latents."""
    latents: Tensor = golden["latents"].transpose(1, 2)
    clip, state = [], None
    for part in latents.split(block, dim=2):
        frames, state = model.decode(part, state)
        clip.append(frames)
    golden.check("frames", ((torch.cat(clip, dim=2) + 1) / 2).clamp(0, 1).transpose(1, 2), FLOAT32)
