"""The tiny decoder for the latents of Wan 2.1: TAE, latents -> frames as a stream with explicit state.

The network is the decoder of the community's `taew2_1` (madebyollin/taehv, MIT licence), under its parameter names. It
is much cheaper than the VAE's decoder, and softer. As in `vae.py` the state of a stream is a list of tensors that the
caller passes in and gets back, and frames are a batch inside: [T, C, h, w].
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from live_avatar.config import TEMPORAL_STRIDE, TAEConfig
from live_avatar.model.casts import in_type
from live_avatar.model.convolution import upsampled_conv
from live_avatar.model.streaming import FeatureCache, StreamingDecoder, Temporal, run_stream

SOFT_LIMIT = 3.0
"""Latents are squashed into -3..3."""


class MemoryBlock(nn.Module, Temporal):
    """Three convolutions over a frame and the one before it, beside an identity path."""

    history = 1

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def stream(self, x: Tensor, cache: FeatureCache) -> Tensor:
        """[T, C, h, w] -> [T, C, h, w]; the slot has the frame before x."""
        last, x = cache.exchange(x, self.history)
        before = torch.cat([torch.zeros_like(x[:1]) if last is None else last, x[:-1]])
        return (self.conv(torch.cat([x, before], dim=1)) + x).relu()


class TimeGrowth(nn.Module, Temporal):
    """Makes `factor` frames of each, by a 1x1 convolution."""

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        self.growth = factor
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


class TAE(StreamingDecoder):
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

    def _frames(self, latents: Tensor, cache: FeatureCache) -> Tensor:
        """Of the first latent's four frames the last belongs to the stream."""
        x = run_stream(self.decoder, in_type(latents[0].transpose(0, 1), next(self.parameters()).dtype), cache)
        frames = x[TEMPORAL_STRIDE - 1 :] if cache.first else x
        return (in_type(frames, torch.float32) * 2 - 1).transpose(0, 1)[None]
