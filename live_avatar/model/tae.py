"""The tiny decoder for the latents of Wan 2.1: TAE, latents -> frames as a stream with explicit state.

The network is the decoder of the community's `taew2_1` (madebyollin/taehv, MIT licence), under its parameter names. It
is much cheaper than the VAE's decoder, and softer. As in `vae.py` the state of a stream is a list of tensors that the
caller passes in and gets back, and frames are a batch inside: [T, C, h, w].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from live_avatar.config import TEMPORAL_STRIDE, TAEConfig
from live_avatar.model.convolution import upsampled_conv

SOFT_LIMIT = 3.0
"""Latents are squashed into -3..3."""


class MemoryBlock(nn.Module):
    """Three convolutions over a frame and the one before it, beside an identity path."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor, last: Tensor) -> Tensor:
        """x [T, C, h, w] and the frame before it [1, C, h, w] -> [T, C, h, w]."""
        before = torch.cat([last, x[:-1]])
        return (self.conv(torch.cat([x, before], dim=1)) + x).relu()


class TimeGrowth(nn.Module):
    """Makes `factor` frames of each, by a 1x1 convolution."""

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, factor * channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[T, C, h, w] -> [factor * T, C, h, w]."""
        return self.conv(x).reshape(-1, *x.shape[1:])


class UpsampledConv(nn.Conv2d):
    """A 3x3 convolution of the nearest neighbours at twice the size, without a bias."""

    def __init__(self, channels: int, made: int) -> None:
        super().__init__(channels, made, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[T, C, h, w] -> [T, C', 2h, 2w]."""
        return upsampled_conv(x, self.weight)


class SoftClamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x / SOFT_LIMIT).tanh() * SOFT_LIMIT


class TAE(nn.Module):
    """The decoder; it has no encoder here, because pictures are encoded by the VAE."""

    def __init__(self, config: TAEConfig) -> None:
        super().__init__()
        self.config = config
        first, *_, last = config.channels
        layers: list[nn.Module] = [SoftClamp(), nn.Conv2d(config.z_dim, first, 3, padding=1), nn.ReLU()]
        for (width, next_width), factor in zip(pairwise(config.channels), config.time_upscale, strict=True):
            layers += [
                *(MemoryBlock(width) for _ in range(config.memory_blocks)),
                nn.Identity(),  # upsamples in the official network; here the growth, which is 1x1, comes before it
                TimeGrowth(width, factor),
                UpsampledConv(width, next_width),
            ]
        self.decoder = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(last, 3, 3, padding=1))

    def decode(self, latents: Tensor, state: Sequence[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """Normalised latents [1, 16, T, h, w] -> frames [1, 3, T', 8h, 8w] in -1..1, not clamped, and the new state.

        With state None T is 1 and T' is 1: of the first latent's four frames the last belongs to the stream. Later
        T' = 4 T. Frames are float32. A state has the last frame that each memory block saw, [1, C, h, w], in the type
        of the weights.
        """
        past = None if state is None else iter(state)
        new_state: list[Tensor] = []
        x = latents[0].transpose(0, 1).to(next(self.parameters()).dtype)
        for layer in self.decoder:
            x = self._remembering(layer, x, past, new_state) if isinstance(layer, MemoryBlock) else layer(x)
        frames = x if past is not None else x[TEMPORAL_STRIDE - 1 :]
        return (frames.float() * 2 - 1).transpose(0, 1)[None], new_state

    @staticmethod
    def _remembering(layer: MemoryBlock, x: Tensor, past: Iterator[Tensor] | None, new_state: list[Tensor]) -> Tensor:
        new_state.append(x[-1:])
        return layer(x, torch.zeros_like(x[:1]) if past is None else next(past))
