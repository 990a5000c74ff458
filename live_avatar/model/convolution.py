"""Convolutions of the video VAE in the forms that run fastest, on frames as a batch: [T, C, h, w].

Each function takes the official weights. The forms differ in rounding only. In an exported graph the rearranged weights
are constants.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from live_avatar.model.casts import in_type

NARROW = 16
"""Most channels for which `_fast_fir` pays: a convolution with fewer than 32 outputs leaves a CPU's registers empty."""


def causal_conv(x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor, time_stride: int = 1) -> Tensor:
    """A 3-D convolution that sees no future, with zero padding in space.

    x [T, C, h, w], the frames before it [kernel - stride, C, h, w] or None for zeros, weight [C', C, kernel, k, k],
    bias [C'] -> [T / stride, C', h, w].
    """
    if history is None:
        return _first_frames(x, weight, bias, time_stride)
    if _is_fast(x.shape[0], weight, time_stride):
        return _fast_fir(torch.cat([history, x]), weight, bias)
    return _sum_of_taps(x, history, weight, bias, time_stride)


def _first_frames(x: Tensor, weight: Tensor, bias: Tensor, time_stride: int) -> Tensor:
    """`causal_conv` behind zeros. The first frame needs the newest tap alone, so it may stand apart."""
    frames, kernel, newest = x.shape[0], weight.shape[2], weight[:, :, -1]
    if frames == 1 or kernel == 1:
        return _conv(x, newest, bias)
    if _is_fast(frames - 1, weight, time_stride):
        others = _fast_fir(torch.cat([torch.zeros_like(x[:1]), x]), weight, bias)
        return torch.cat([_conv(x[:1], newest, bias), others])
    return causal_conv(x, x.new_zeros(kernel - time_stride, *x.shape[1:]), weight, bias, time_stride)


def _is_fast(frames: int, weight: Tensor, time_stride: int) -> bool:
    """Whether `_fast_fir` makes that number of frames, and pays off."""
    narrow = time_stride == 1 and weight.shape[2] == 3 and max(weight.shape[:2]) <= NARROW
    return narrow and frames >= 4 and frames % 2 == 0


def upsampled_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 3x3 convolution of the nearest neighbours at twice the size, as one 2x2 convolution at the size of x.

    x [T, C, h, w], weight [C', C, 3, 3], bias [C'] -> [T, C', 2h, 2w]. An output pixel has four different neighbours,
    and which ones depends on whether its row and its column are even: four phases with 4/9 of the operations. (A
    transposed convolution does the same, but TensorRT has none in bfloat16.)
    """
    height, width = x.shape[2:]
    phases = F.conv2d(x, _four_phases(weight), None if bias is None else bias.repeat(4), padding=1)
    made = phases.chunk(4, dim=1)
    rows = [
        torch.stack([made[2 * row + column][..., row : row + height, column : column + width] for column in (0, 1)], -1)
        for row in (0, 1)
    ]
    return torch.stack(rows, 3).reshape(x.shape[0], -1, 2 * height, 2 * width)


def _four_phases(weight: Tensor) -> Tensor:
    """Three taps on doubled pixels as two taps on the pixels: [C', C, 3, 3] -> [4 C', C, 2, 2].

    For an even place these are first, and middle + last; for an odd one first + middle, and last. With a zero on either
    side all are sums of two neighbours.
    """
    padded = F.pad(in_type(weight, torch.float32), (1, 1, 1, 1))
    rows = padded[:, :, 1:] + padded[:, :, :-1]
    sums = (rows[..., 1:] + rows[..., :-1]).unflatten(3, (2, 2)).unflatten(2, (2, 2))
    return in_type(sums.permute(3, 5, 0, 1, 2, 4).flatten(0, 2), weight.dtype)


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


def _fast_fir(frames: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Three taps in time, for all frames but the first two, as a two-parallel fast FIR filter.

    Pairs of frames have their channels side by side. Pair i is made of the pair before it and itself: older p[i - 1] +
    newer p[i]. Two of these take three products instead of four: with s = (older + newer) p[i], pair i is
    s + older (p[i - 1] - p[i]), and pair i + 1 is s + newer (p[i + 1] - p[i]). (Parhi, VLSI Digital Signal Processing
    Systems, section 9.2.)
    """
    first, middle, last = (weight[:, :, tap] for tap in range(3))
    none = torch.zeros_like(first)
    older = torch.cat([torch.cat([first, middle], 1), torch.cat([none, first], 1)])
    newer = torch.cat([torch.cat([last, none], 1), torch.cat([middle, last], 1)])
    pairs = frames.reshape(-1, 2 * frames.shape[1], *frames.shape[2:])
    two_biases = torch.cat([bias, bias])
    before, even, odd = pairs[:-2:2], pairs[1:-1:2], pairs[2::2]
    shared = _conv(even, older + newer, two_biases)
    made = torch.stack([shared + _conv(before - even, older), shared + _conv(odd - even, newer)], 1).flatten(0, 1)
    if len(pairs) % 2 == 0:  # the last one is alone
        made = torch.cat([made, _conv(pairs[-2:-1], older) + _conv(pairs[-1:], newer, two_biases)])
    return made.reshape(-1, weight.shape[0], *frames.shape[2:])
