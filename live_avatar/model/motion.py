"""Frame packing: motion latents become tokens, the older the coarser (spec section 6).

Knows only the packing; positions are `rope.motion_grid`'s, the mask embedding is the DiT's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from live_avatar.config import LATENT_CHANNELS, MOTION_LATENTS


class FramePacker(nn.Module):
    """Three non-overlapping convolutions over the last 1, 2 and 16 of 19 motion latents."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(LATENT_CHANNELS, dim, kernel_size=(1, 2, 2), stride=(1, 2, 2))
        self.proj_2x = nn.Conv3d(LATENT_CHANNELS, dim, kernel_size=(2, 4, 4), stride=(2, 4, 4))
        self.proj_4x = nn.Conv3d(LATENT_CHANNELS, dim, kernel_size=(4, 8, 8), stride=(4, 8, 8))

    def forward(self, motion: Tensor) -> Tensor:
        """[1, 16, n, h, w] motion latents, any n (zeros stand before too few) -> tokens [1, L, C]."""
        missing = MOTION_LATENTS - motion.shape[2]
        if missing > 0:
            motion = torch.cat([motion.new_zeros(*motion.shape[:2], missing, *motion.shape[3:]), motion], dim=2)
        groups = (
            self.proj(motion[:, :, -1:]),
            self.proj_2x(motion[:, :, -3:-1]),
            self.proj_4x(motion[:, :, -19:-3]),
        )
        return torch.cat([group.flatten(2).transpose(1, 2) for group in groups], dim=1)
