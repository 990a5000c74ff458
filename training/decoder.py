"""A tiny decoder learns to give the frames that the frozen VAE's decoder gives of the same latents.

The VAE's frames are the goal and not the drawn ones, because they exist for any latents. So noise on the latents is
allowed, and the decoder knows latents that no encoder gives: the transformer's.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from live_avatar.config import LATENT_CHANNELS, SPATIAL_STRIDE, TEMPORAL_STRIDE, TAEConfig
from live_avatar.model.tae import TAE, MemoryBlock, TimeGrowth
from live_avatar.model.vae import VAE
from training.checkpoints import load_weights
from training.config import TrainingConfig
from training.encoded import ENCODERS
from training.loop import generator
from training.reconstruction import ReconstructionTraining
from training.vae import HEAD_SCALE, Streams, channels_last, reconstruct

STAGE = "decoder"
FILE = f"{STAGE}/tae.safetensors"
"""The trained decoder in a run's folder, for `live-avatar export --decoder`."""
GREY = 0.5


@torch.no_grad()
def fresh_tae(config: TAEConfig, draw: torch.Generator) -> TAE:
    """A decoder that starts as one of pictures: memory blocks change nothing, and each frame is copied in time.

    Other convolutions keep the size of their input through the ReLU behind them (deviation sqrt(2 / fan in)).
    """
    tae = TAE(config)
    convolutions = [module for module in tae.modules() if isinstance(module, nn.Conv2d)]
    for conv in convolutions:
        conv.weight.normal_(0, (2 / conv.weight[0].numel()) ** 0.5, generator=draw)
        if conv.bias is not None:
            conv.bias.zero_()
    for module in tae.modules():
        if isinstance(module, MemoryBlock):
            cast(nn.Conv2d, module.conv[-1]).weight.zero_()
        elif isinstance(module, TimeGrowth):
            wide, narrow = module.conv.weight.shape[:2]
            module.conv.weight.copy_(torch.eye(narrow).repeat(wide // narrow, 1)[:, :, None, None])
    head = convolutions[-1]
    head.weight.mul_(HEAD_SCALE)
    cast(Tensor, head.bias).fill_(GREY)
    return channels_last(tae)


def decoded(tae: TAE, latents: Tensor) -> Tensor:
    """The frames of a stream from its first latent on, [1, 16, T, h, w] -> [1, 3, 4 T - 3, 8h, 8w]."""
    return tae.decode(latents, None)[0]


class DecoderTraining(ReconstructionTraining):
    """The stage; see `training.loop.Stage`."""

    part = "tae"

    def __init__(self, config: TrainingConfig, vae: VAE, tae: TAE) -> None:
        super().__init__(config, STAGE, config.decoder, tae)
        self._vae, self._tae, self._noise = vae, tae, config.decoder.noise

    def _shown(self, video: Tensor) -> Tensor:
        return decoded(self._tae, reconstruct(self._vae, video, Streams())[1])

    def _learn_video(self, video: Tensor, weights: Tensor, draw: torch.Generator, shares: int) -> dict[str, float]:
        frames, latents = self._lesson(video, draw)
        with torch.autocast("cpu", torch.bfloat16):
            made = decoded(self._tae, latents)
        error = (made - frames).abs()
        loss = (weights * self._penalty(error)).mean()
        (loss / shares).backward()
        return {"loss": loss.item(), "error": error.mean().item()}

    @torch.no_grad()
    def _lesson(self, video: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """The VAE's frames of a video's latents with noise, and these latents."""
        count = 1 + (video.shape[2] - 1) // TEMPORAL_STRIDE
        shape = (1, LATENT_CHANNELS, count, *(side // SPATIAL_STRIDE for side in video.shape[-2:]))
        noise = self._noise * torch.rand((), generator=draw) * torch.randn(shape, generator=draw)
        with torch.autocast("cpu", torch.bfloat16):
            frames, latents = reconstruct(self._vae, video, Streams(), noise)
        return frames.float().clamp(-1, 1), latents.float() + noise


def make_stage(config: TrainingConfig, out: Path) -> DecoderTraining:
    """The stage on the trained VAE in the run's folder `out`. Raises `CheckpointError`."""
    vae = VAE(config.system.vae)
    load_weights(out / ENCODERS["vae"], vae)
    return DecoderTraining(
        config, channels_last(vae), fresh_tae(config.decoder.network, generator(config.seed, STAGE, "start"))
    )
