"""Multi-head attention as all networks of the DiT use it: normalised queries and keys, heads outside.

The linears here are those that may run in 16 bits (`Preset.precision`); norms and rotations are computed in float32
whatever they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from live_avatar.model.casts import in_type


class Linear(nn.Linear):
    """A linear whose weights' type decides the type it computes in."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] of any floating type -> [..., out] of the weights' type."""
        return super().forward(in_type(x, self.weight.dtype))


class Attention(nn.Module):
    """Projections q, k, v, o with an RMSNorm over all channels on queries and keys (spec section 2)."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(dim, dim)
        self.k = Linear(dim, dim)
        self.v = Linear(dim, dim)
        self.o = Linear(dim, dim)
        self.norm_q = nn.RMSNorm(dim, eps=eps)
        self.norm_k = nn.RMSNorm(dim, eps=eps)

    def _split(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, N, L, D]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def query(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, N, L, D] float32."""
        return self._split(_normalised(self.norm_q, self.q(x)))

    def key(self, x: Tensor) -> Tensor:
        """[B, L, C] -> normalised keys [B, N, L, D] float32, not rotated."""
        return self._split(_normalised(self.norm_k, self.k(x)))

    def value(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, N, L, D] in the type of caches."""
        return self._split(self.v(x))

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L, C] -> keys (normalised, not rotated) and values, [B, N, L, D] each, in the type of caches."""
        value = self.value(x)
        return in_type(self.key(x), value.dtype), value

    def across(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Attention of x [B, L, C] to other tokens [B, M, C], without positions -> [B, L, C]."""
        key, value = self.key_value(tokens)
        return self.forward(self.query(x), key, value)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries [B, N, L, D] over keys and values [B, N, M, D] -> [B, L, C], no mask."""
        return self.o(_joined(attend(query, key, value)))


def _normalised(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, float32.

    Squares of bfloat16 stay in bfloat16, whose roundings cancel out in the mean of thousands. With float32 squares the
    compiler writes a float32 copy of x between its two kernels (docs/log.md). In float16 squares would overflow.
    """
    if x.dtype is not torch.bfloat16:
        return norm(in_type(x, torch.float32))
    assert norm.eps is not None
    mean_square = (x * x).float().mean(-1, keepdim=True)
    return x.float() * torch.rsqrt(mean_square + norm.eps) * norm.weight


def _joined(x: Tensor) -> Tensor:
    """[B, N, L, D] -> [B, L, C]. One sequence goes without its batch, which spares TensorRT a copy (docs/log.md)."""
    if x.shape[0] == 1:
        return x.squeeze(0).transpose(0, 1).flatten(1).unsqueeze(0)
    return x.transpose(1, 2).flatten(2)


def attend(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
    """Softmax attention of [B, N, L, D] over [B, N, M, D], in the values' type.

    Queries are scaled here and not inside: TensorRT's attention layer takes no scale.
    """
    query = in_type(query * query.shape[-1] ** -0.5, value.dtype)
    return F.scaled_dot_product_attention(query, in_type(key, value.dtype), value, dropout_p=dropout, scale=1.0)


def rotate(x: Tensor, phase: Tensor) -> Tensor:
    """Turns adjacent channel pairs of x [B, N, L, D] by the phases [2, L, D / 2] in float32 (spec section 4)."""
    pairs = in_type(x, torch.float32).unflatten(-1, (-1, 2))
    real, imaginary = pairs[..., 0], pairs[..., 1]
    cosine, sine = phase[0], phase[1]
    turned = torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], dim=-1)
    return in_type(turned.flatten(-2), x.dtype)
