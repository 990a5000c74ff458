"""Multi-head attention as all networks of the DiT use it: normalised queries and keys, heads outside.

Knows no cache and no positions: keys and values come in ready, rotated or not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Projections q, k, v, o with an RMSNorm over all channels on queries and keys (spec section 2)."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = nn.RMSNorm(dim, eps=eps)
        self.norm_k = nn.RMSNorm(dim, eps=eps)

    def _split(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, N, L, D]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def query(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, N, L, D]."""
        return self._split(self.norm_q(self.q(x)))

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L, C] -> keys (normalised, not rotated) and values, [B, N, L, D] each."""
        return self._split(self.norm_k(self.k(x))), self._split(self.v(x))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries [B, N, L, D] over keys and values [B, N, M, D] -> [B, L, C], no mask."""
        out = F.scaled_dot_product_attention(query, key, value)
        return self.o(out.transpose(1, 2).flatten(2))


def rotate(x: Tensor, phase: Tensor) -> Tensor:
    """Turns adjacent channel pairs of x [B, N, L, D] by the phases [2, L, D / 2] (spec section 4)."""
    pairs = x.unflatten(-1, (-1, 2))
    real, imaginary = pairs[..., 0], pairs[..., 1]
    cosine, sine = phase[0], phase[1]
    return torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], dim=-1).flatten(-2)
