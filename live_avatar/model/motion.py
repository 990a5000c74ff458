"""Frame packing: motion latents become tokens, the older the coarser (spec section 6)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from live_avatar.config import FRAME_PACKING, LATENT_CHANNELS, MOTION_LATENTS


class FramePacker(nn.Module):
    """A non-overlapping convolution for each of `FRAME_PACKING`: the last 1, 2 and 16 of 19 motion latents."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj, self.proj_2x, self.proj_4x = (
            nn.Conv3d(LATENT_CHANNELS, dim, kernel_size=group.kernel, stride=group.kernel) for group in FRAME_PACKING
        )

    def forward(self, motion: Tensor) -> Tensor:
        """[1, 16, n, h, w] motion latents, any n (zeros stand before too few) -> tokens [1, L, C]."""
        missing = MOTION_LATENTS - motion.shape[2]
        if missing > 0:
            motion = torch.cat([motion.new_zeros(*motion.shape[:2], missing, *motion.shape[3:]), motion], dim=2)
        packed, newer = [], 0
        for group, convolution in zip(FRAME_PACKING, (self.proj, self.proj_2x, self.proj_4x), strict=True):
            start, stop = -newer - group.latents, -newer if newer else None
            packed.append(convolution(motion[:, :, start:stop]))
            newer += group.latents
        return torch.cat([features.flatten(2).transpose(1, 2) for features in packed], dim=1)
