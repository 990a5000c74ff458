"""Tensors in 8-bit floating point, e4m3fn, with one scale each: the quantizer of the released code (spec section 15).

e4m3fn has 4 bits of exponent and 3 of mantissa, no infinity, and 448 as its largest number.
`live_avatar/exporter/quantization.py` makes static scales and ONNX of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_E4M3 = 448.0
MIN_AMAX = 1e-12
MAX_QUANT_SCALE = 448.0
"""A tensor whose largest value is below 1 is multiplied by no more than this; e4m3fn still has exponents to spare."""


def quant_scale(amax: Tensor) -> Tensor:
    """What a tensor of largest absolute value `amax` is multiplied by before rounding; float32, shape of `amax`."""
    return (MAX_E4M3 / amax.float().clamp(min=MIN_AMAX)).clamp(max=MAX_QUANT_SCALE)


def saturate(x: Tensor) -> Tensor:
    """The nearest e4m3fn numbers; what is out of range becomes the largest number and not NaN."""
    return x.float().clamp(-MAX_E4M3, MAX_E4M3).to(torch.float8_e4m3fn)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x of any shape -> its e4m3fn numbers, and what they count: the inverse scale, a float32 scalar."""
    scale = quant_scale(x.abs().max())
    return saturate(x.float() * scale), 1 / scale


def dequantize(quantized: Tensor, dequant_scale: Tensor) -> Tensor:
    """float32 values of e4m3fn numbers."""
    return quantized.float() * dequant_scale


def fake_quantize(x: Tensor) -> Tensor:
    """x as an operand of the released code's FP8 linears, float32; they scale the activation anew in every call."""
    return dequantize(*quantize(x))
