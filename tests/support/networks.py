"""Small real networks for the core's tests: the tiny preset at 64 x 64, and what may vary without new weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from live_avatar.arrays import Array
from live_avatar.config import MOTION_LATENTS, TINY, Preset
from live_avatar.pipeline.denoiser import Denoiser, one_step
from live_avatar.pipeline.sink import SinkSource
from live_avatar.runtime import Graph, Runtime

SMALL = replace(TINY, name="small").with_stream(height=64, width=64)


@dataclass
class Restreamed:
    """The same graphs under another way of streaming; for settings that no graph depends on."""

    preset: Preset
    runtime: Runtime

    def __post_init__(self) -> None:
        self.tokenizer = self.runtime.tokenizer
        self.zeros = self.runtime.zeros
        self.free_bytes = self.runtime.free_bytes
        self.modulation = self.runtime.modulation

    def graph(self, component: str) -> Graph:
        return self.runtime.graph(component)


def restreamed(runtime: Runtime, **changes: Any) -> Restreamed:
    return Restreamed(runtime.preset.with_stream(**changes), runtime)


def randomised(module: nn.Module, seed: int = 3) -> nn.Module:
    """Every parameter drawn, gates and norms included, so that no part of the network is silent."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
        parameter.data = torch.randn(parameter.shape, generator=generator) * fan_in**-0.5
    return module.eval().requires_grad_(False)


def drawn_source(preset: Preset, seed: int) -> SinkSource:
    """What a sink is prefilled from, drawn: float32 of the preset's shapes."""
    generator = np.random.default_rng(seed)
    height, width = preset.stream.latent_height, preset.stream.latent_width
    shapes = [(1, 16, 1, height, width), (1, 16, MOTION_LATENTS, height, width)]
    return SinkSource(
        *(
            generator.standard_normal(shape, dtype=np.float32)
            for shape in (*shapes, (preset.dit.text_len, preset.dit.text_dim))
        )
    )


def drawn_block(preset: Preset, drawn: np.random.Generator) -> tuple[Array, dict[str, Array]]:
    """Latents [1, 16, F, h, w] and audio of a block of one speaker, for `Denoiser.run`."""
    frames, dit = preset.stream.frames_per_block, preset.dit
    latent = drawn.standard_normal((1, *preset.stream.latent_shape), dtype=np.float32)
    audio = {
        "audio_local": drawn.standard_normal((1, frames, dit.num_audio_token + 1, dit.dim), dtype=np.float32),
        "audio_global": drawn.standard_normal((1, frames, dit.dim), dtype=np.float32),
        "audio_weight": np.ones((1, frames, preset.stream.frame_tokens), dtype=np.float32),
    }
    return latent, audio


def first_step(runtime: Runtime, blocks: int) -> list[Array]:
    """Latents of so many blocks after the first step, [1, 16, F, h, w] each. Every runtime gets the same inputs."""
    denoiser, drawn = Denoiser(runtime, one_step(1)), np.random.default_rng(3)
    state = denoiser.open(denoiser.prefill(drawn_source(runtime.preset, 1)))
    return [denoiser.run(state, *drawn_block(runtime.preset, drawn)) for _ in range(blocks)]
