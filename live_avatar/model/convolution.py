"""Convolutions of the video VAE in the forms that run fastest, on frames as a batch: [T, C, h, w].

Each function takes the official weights. The forms differ in rounding only. In an exported graph the rearranged weights
are constants.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NARROW = 16
"""Most channels for which `_fast_fir` pays: a convolution with fewer than 32 outputs leaves a CPU's registers empty."""
PAIRED = 4
"""Frames that `_fast_fir` makes at once: two pairs."""


def causal_conv(x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor, time_stride: int = 1) -> Tensor:
    """A 3-D convolution that sees no future, with zero padding in space.

    x [T, C, h, w], the frames before it [kernel - stride, C, h, w], weight [C', C, kernel, k, k], bias [C'] ->
    [T / stride, C', h, w]. Without history, the kernel is 1 or x is the first frame of a stream, and the newest tap is
    all that counts.
    """
    if history is None:
        return _conv(x, weight[:, :, -1], bias)
    if time_stride == 1 and weight.shape[2] == 3 and max(weight.shape[:2]) <= NARROW and x.shape[0] % PAIRED == 0:
        return _fast_fir(x, history, weight, bias)
    return _sum_of_taps(x, history, weight, bias, time_stride)


def upsampled_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 3x3 convolution of the nearest neighbours at twice the size, as one 2x2 convolution at the size of x.

    x [T, C, h, w], weight [C', C, 3, 3], bias [C'] -> [T, C', 2h, 2w]. An output pixel has four different neighbours,
    and which ones depends on whether its row and its column are even: four phases with 4/9 of the operations. (A
    transposed convolution does the same, but TensorRT has none in bfloat16.)
    """
    height, width = x.shape[2:]
    phases = [phase for rows in _phases(weight.float(), 2) for phase in _phases(rows, 3)]
    four = torch.cat(phases).to(weight.dtype)
    made = F.conv2d(x, four, None if bias is None else bias.repeat(4), padding=1).chunk(4, dim=1)
    rows = [
        torch.stack([made[2 * row + column][..., row : row + height, column : column + width] for column in (0, 1)], -1)
        for row in (0, 1)
    ]
    return torch.stack(rows, 3).reshape(x.shape[0], -1, 2 * height, 2 * width)


def _phases(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Three taps on doubled pixels as two taps on the pixels, for an even and for an odd place."""
    first, middle, last = weight.unbind(dim)
    return torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


def _sum_of_taps(x: Tensor, history: Tensor, weight: Tensor, bias: Tensor, time_stride: int) -> Tensor:
    """One 2-D convolution for each tap in time; ONNX Runtime and TensorRT add them as they go."""
    last, count = weight.shape[2] - 1, x.shape[0] // time_stride
    y = _conv(x[time_stride - 1 :: time_stride] if time_stride > 1 else x, weight[:, :, last], bias)
    frames = torch.cat([history, x])
    for tap in range(last):
        end = tap + time_stride * (count - 1) + 1
        y = y + _conv(frames[tap:end:time_stride], weight[:, :, tap])
    return y


def _fast_fir(x: Tensor, history: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Three taps in time, with the channels of two frames side by side, as a two-parallel fast FIR filter.

    Pair i is made of the pair before it and itself: older p[i - 1] + newer p[i]. Two of these take three products
    instead of four: with s = (older + newer) p[i], pair i is s + older (p[i - 1] - p[i]), and pair i + 1 is
    s + newer (p[i + 1] - p[i]). (Parhi, VLSI Digital Signal Processing Systems, section 9.2.)
    """
    first, middle, last = (weight[:, :, tap] for tap in range(3))
    none = torch.zeros_like(first)
    older = torch.cat([torch.cat([first, middle], 1), torch.cat([none, first], 1)])
    newer = torch.cat([torch.cat([last, none], 1), torch.cat([middle, last], 1)])
    channels, size = x.shape[1], x.shape[2:]
    even, odd = x.reshape(-1, 2, 2 * channels, *size).unbind(1)
    before = torch.cat([history.reshape(1, 2 * channels, *size), odd[:-1]])
    shared = _conv(even, older + newer, torch.cat([bias, bias]))
    pairs = torch.stack([shared + _conv(before - even, older), shared + _conv(odd - even, newer)], 1)
    return pairs.reshape(x.shape[0], weight.shape[0], *size)
