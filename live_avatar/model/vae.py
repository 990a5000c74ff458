"""The causal video VAE as two streams: frames -> latents and latents -> frames (spec section 13).

Official parameter names; the state of a stream is a list of tensors that the caller passes in and gets back, never on
the module, so any number of streams share one VAE. A stream begins with state None. Time resampling leaves its first
frame (or latent) alone. State has the type of the weights; frames and latents are float32. Inside, frames are a batch:
[T, C, h, w].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from live_avatar.config import LATENT_CHANNELS, TEMPORAL_STRIDE, VAEConfig
from live_avatar.model.attention import attend
from live_avatar.model.casts import in_type
from live_avatar.model.convolution import causal_conv, upsampled_conv
from live_avatar.model.streaming import (
    FeatureCache,
    HeldCache,
    StreamingDecoder,
    Temporal,
    held,
    run_stream,
)

LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
EPS = 1e-12  # least length that a norm divides by


class CausalConv3d(nn.Conv3d, Temporal):
    """3-D convolution that sees no future: its temporal history is a slot of the stream."""

    bias: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, kernel: tuple[int, int, int], time_stride: int = 1, growth: int = 1
    ) -> None:
        super().__init__(in_channels, growth * out_channels, kernel)
        self.time_stride = time_stride
        self.history = kernel[0] - time_stride
        self.growth = growth

    def stream(self, x: Tensor, cache: FeatureCache, before: Tensor | None = None) -> Tensor:
        """[T, C, h, w] -> [growth * T / stride, C', h, w]; the earlier of the frames have the first channels.

        before: the history at the start of a stream, zeros if None.
        """
        history, x = cache.exchange(x, self.history, self.time_stride, before) if self.history else (None, x)
        made = causal_conv(x, history, self.weight, self.bias, self.time_stride)
        return made if self.growth == 1 else made.reshape(-1, self.out_channels // self.growth, *made.shape[2:])


class RMSNorm(nn.Module):
    """Unit length over channels, times sqrt(channels) and a gain."""

    def __init__(self, channels: int, trailing: int) -> None:
        super().__init__()
        self.least_square = EPS**2 / channels
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * trailing))

    def forward(self, x: Tensor) -> Tensor:
        """[T, C, h, w] -> the same."""
        wide = in_type(x, torch.float32)
        square = (wide * wide).mean(dim=1, keepdim=True)
        return in_type(wide * square.clamp(min=self.least_square).rsqrt() * self.gamma.reshape(-1, 1, 1), x.dtype)


class Residual(nn.Module):
    """Two normed convolutions beside an identity (or 1x1x1) path."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        kernel = (3, 3, 3)
        self.residual = nn.Sequential(
            RMSNorm(in_channels, 3),
            nn.SiLU(),
            CausalConv3d(in_channels, out_channels, kernel),
            RMSNorm(out_channels, 3),
            nn.SiLU(),
            nn.Identity(),  # the place of the dropout in the official numbering
            CausalConv3d(out_channels, out_channels, kernel),
        )
        self.shortcut = None if in_channels == out_channels else CausalConv3d(in_channels, out_channels, (1, 1, 1))

    def stream(self, x: Tensor, cache: FeatureCache) -> Tensor:
        made = run_stream(self.residual, x, cache)
        kept = cache.beside(x, made)
        return made + (kept if self.shortcut is None else self.shortcut.stream(kept, cache))


class SpatialAttention(nn.Module):
    """Single-head attention over the pixels of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[T, C, h, w] -> the same."""
        qkv = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None]  # [T, 1, h * w, 3C]
        out = attend(*qkv.chunk(3, dim=-1))
        return x + self.proj(out[:, 0].transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """Half the space, and with `time` half the frames."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = CausalConv3d(channels, channels, (3, 1, 1), time_stride=2) if time else None

    def stream(self, x: Tensor, cache: FeatureCache) -> Tensor:
        x = self.resample(x)
        return x if self.time_conv is None else _resample_time(self.time_conv, x, cache, x[:1])


class UpsampledConv2d(nn.Conv2d):
    """3x3 convolution of the nearest neighbours at twice the size."""

    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[T, C, h, w] -> [T, C', 2h, 2w]."""
        return upsampled_conv(x, self.weight, self.bias)


class Upsample(nn.Module):
    """Twice the space with half the channels, and with `time` twice the frames."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Identity(),  # the place of the upsampling in the official numbering
            UpsampledConv2d(channels, channels // 2, 3),
        )
        self.time_conv = CausalConv3d(channels, channels, (3, 1, 1), growth=2) if time else None

    def stream(self, x: Tensor, cache: FeatureCache) -> Tensor:
        if self.time_conv is not None:
            x = _resample_time(self.time_conv, x, cache, None)
        return self.resample(x)


def _resample_time(convolution: CausalConv3d, x: Tensor, cache: FeatureCache, before: Tensor | None) -> Tensor:
    """A convolution over all frames of a stream but the first, which stays.

    before: the history of the others where the stream begins, zeros if None.
    """
    if not cache.first:
        return convolution.stream(x, cache)
    if x.shape[0] == 1:
        cache.exchange(x[1:], convolution.history, convolution.time_stride, before)
        return x
    return cache.behind_first(x[:1], convolution.stream(x[1:], cache, before))


def _as_batch(clip: Tensor) -> Tensor:
    """[1, C, T, h, w] -> [T, C, h, w]."""
    return clip[0].transpose(0, 1)


def _as_clip(frames: Tensor) -> Tensor:
    """[T, C, h, w] -> [1, C, T, h, w]."""
    return frames.transpose(0, 1)[None]


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.dim * m for m in config.dim_mult]
        kernel = (3, 3, 3)
        self.conv1 = CausalConv3d(3, config.dim, kernel)
        layers: list[nn.Module] = []
        channels = config.dim
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                layers.append(Residual(channels, width))
                channels = width
            if level < len(widths) - 1:
                layers.append(Downsample(channels, config.temporal_downsample[level]))
        self.downsamples = nn.Sequential(*layers)
        self.middle = nn.Sequential(
            Residual(channels, channels), SpatialAttention(channels), Residual(channels, channels)
        )
        self.head = nn.Sequential(RMSNorm(channels, 3), nn.SiLU(), CausalConv3d(channels, 2 * config.z_dim, kernel))

    def stream(self, x: Tensor, cache: FeatureCache) -> Tensor:
        x = self.conv1.stream(x, cache)
        for part in (self.downsamples, self.middle, self.head):
            x = run_stream(part, x, cache)
        return x


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.dim * m for m in reversed(config.dim_mult)]
        kernel = (3, 3, 3)
        channels = widths[0]
        self.conv1 = CausalConv3d(config.z_dim, channels, kernel)
        self.middle = nn.Sequential(
            Residual(channels, channels), SpatialAttention(channels), Residual(channels, channels)
        )
        layers: list[nn.Module] = []
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks + 1):
                layers.append(Residual(channels, width))
                channels = width
            if level < len(widths) - 1:
                layers.append(Upsample(channels, tuple(reversed(config.temporal_downsample))[level]))
                channels //= 2
        self.upsamples = nn.Sequential(*layers)
        self.head = nn.Sequential(RMSNorm(channels, 3), nn.SiLU(), CausalConv3d(channels, 3, kernel))

    def stream(self, x: Tensor, cache: FeatureCache) -> Tensor:
        x = self.conv1.stream(x, cache)
        for part in (self.middle, self.upsamples, self.head):
            x = run_stream(part, x, cache)
        return x


class VAE(StreamingDecoder):
    """Encoder and decoder with the latents' normalisation; frames are in -1..1."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1))
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1))
        self.decoder = Decoder(config)
        shape = (1, LATENT_CHANNELS, 1, 1, 1)
        # On the CPU, also where the weights stand on the meta device: these are numbers of the format, not weights.
        for name, values in (("mean", LATENT_MEAN), ("std", LATENT_STD)):
            self.register_buffer(name, torch.tensor(values, device="cpu").reshape(shape), persistent=False)

    def encode(self, frames: Tensor, state: Sequence[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """Frames [1, 3, T, 8h, 8w] in -1..1 -> latents [1, 16, T', h, w] and the stream's new state.

        T = 4 T'; with state None, at the start of a stream, T = 4 T' - 3.
        """
        cache = FeatureCache(state)
        x = self.encoder.stream(in_type(_as_batch(frames), self.conv1.weight.dtype), cache)
        return self._normalised(x, cache), cache.out

    def encode_still(self, picture: Tensor, latents: int) -> Tensor:
        """A picture [1, 3, 1, 8h, 8w] in -1..1 -> [1, 16, latents, h, w], those of a stream that begins with it and
        holds it for 1 + 4 (latents - 1) frames.

        They differ in rounding only from those that `encode` gives for the repeated frames, at about a quarter of the
        work: the wide layers see the same features from the 11th frame on.
        """
        cache = HeldCache(TEMPORAL_STRIDE * (latents - 1))
        x = self.encoder.stream(in_type(_as_batch(picture), self.conv1.weight.dtype), cache)
        return self._normalised(held(x, latents), cache)

    def _normalised(self, x: Tensor, cache: FeatureCache) -> Tensor:
        """What the encoder gives, [T, 32, h, w] -> latents [1, 16, T, h, w]."""
        moments = _as_clip(in_type(self.conv1.stream(x, cache)[:, : self.config.z_dim], torch.float32))
        return (moments - self.mean) / self.std

    def _frames(self, latents: Tensor, cache: FeatureCache) -> Tensor:
        denormalised = in_type(_as_batch(latents * self.std + self.mean), self.conv2.weight.dtype)
        x = self.conv2.stream(denormalised, cache)
        return _as_clip(in_type(self.decoder.stream(x, cache), torch.float32))
