"""Stages 0a and 0b: the video VAE learns to reconstruct rendered clips, as streams.

The first steps use stills of many faces, because the frames of one clip are too similar to learn colours and faces
quickly. Then the steps use clips. A clip begins with one frame, the still picture or any other, and continues in pieces
of a block with the state of the piece before. So the network is trained on the start of a stream and on its
continuation. After training, two 1x1x1 convolutions are changed so that each channel of the latents has mean 0 and
deviation 1, because the constants of the format are those of another VAE.

The second stage also learns mouths, cut out of whole clips; its pieces of whole pictures keep the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from live_avatar.config import VAEConfig
from live_avatar.model.vae import VAE, Downsample, Residual, Upsample
from training.checkpoints import load_weights
from training.config import TrainingConfig, VAEReconstructionStage
from training.data.clips import make_clip
from training.data.split import Split
from training.encoded import pixels
from training.loop import generator
from training.reconstruction import CLIP_BLOCKS, ReconstructionTraining, draw_still

STAGE = "vae"
MOUTHS = "mouths"
VAE_FILE = f"{STAGE}/vae.safetensors"
"""File of the first stage in a run's folder."""
HEAD_SCALE = 0.3
"""Factor of the weights of the first pictures, because grey pictures are a better start than noise."""
STATISTICS_CLIPS = 64
"""Number of training clips for the means and deviations of the latents."""

Network = TypeVar("Network", bound=nn.Module)


@torch.no_grad()
def fresh_vae(config: VAEConfig, draw: torch.Generator) -> VAE:
    """A VAE that starts as a VAE of pictures: no convolution uses earlier frames, and every residual branch gives 0.

    Convolutions keep the size of their input (deviation 1 / sqrt(fan in), for the newest frame). In the same number of
    steps this reaches 2 to 3 dB more than torch's own initialisation.
    """
    vae = VAE(config)
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            _begin(module, draw)
    for module in vae.modules():
        if isinstance(module, Residual):
            _scale(module.residual[-1], 0.0)
        elif isinstance(module, Downsample | Upsample) and module.time_conv is not None:
            _pass_on(module.time_conv)
    _scale(vae.decoder.head[-1], HEAD_SCALE)
    return channels_last(vae)


def _begin(conv: nn.Conv2d | nn.Conv3d, draw: torch.Generator) -> None:
    assert conv.bias is not None
    conv.bias.zero_()
    newest = conv.weight[:, :, -1] if isinstance(conv, nn.Conv3d) else conv.weight
    conv.weight.zero_()
    newest.normal_(0, newest[0].numel() ** -0.5, generator=draw)


def _scale(conv: nn.Module, factor: float) -> None:
    assert isinstance(conv, nn.Conv2d | nn.Conv3d)
    conv.weight.mul_(factor)


def _pass_on(conv: nn.Conv3d) -> None:
    """Every output frame is the newest input frame."""
    conv.weight.zero_()
    for copy in conv.weight[:, :, -1, 0, 0].split(conv.in_channels):
        copy.copy_(torch.eye(conv.in_channels))


def channels_last(network: Network) -> Network:
    """The same weights in the fastest memory format for torch's convolutions on a CPU."""
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        elif isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


@dataclass
class Streams:
    """States of a stream through the encoder and the decoder; None at its start."""

    encoder: list[Tensor] | None = None
    decoder: list[Tensor] | None = None

    def cut(self) -> Streams:
        """The same without gradient."""
        assert self.encoder is not None
        assert self.decoder is not None
        return Streams([slot.detach() for slot in self.encoder], [slot.detach() for slot in self.decoder])


def reconstruct(vae: VAE, video: Tensor, streams: Streams, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """[1, 3, T, H, W] -> frames of the same shape, and latents; advances the streams. Noise is added to the latents."""
    latents, streams.encoder = vae.encode(video, streams.encoder)
    frames, streams.decoder = vae.decode(latents if noise is None else latents + noise, streams.decoder)
    return frames, latents


def fold(vae: VAE, mean: Tensor, deviation: Tensor) -> None:
    """Moves an affine map per channel from the latents into `conv1` and `conv2`; reconstructions do not change.

    mean, deviation: [16], of the latents from `encode`; afterwards they are 0 and 1. With the format's constants m and
    s, conv1's output y becomes m + (y - m - s mean) / deviation, and conv2 first inverts this.
    """
    offset, spread = vae.mean.flatten(), vae.std.flatten()
    kept = vae.config.z_dim
    shift = offset + spread * mean
    assert vae.conv1.bias is not None
    assert vae.conv2.bias is not None
    vae.conv1.weight[:kept] /= deviation.reshape(-1, 1, 1, 1, 1)
    vae.conv1.bias[:kept] = offset + (vae.conv1.bias[:kept] - shift) / deviation
    vae.conv2.bias += vae.conv2.weight[:, :, 0, 0, 0] @ (shift - offset * deviation)
    vae.conv2.weight *= deviation.reshape(1, -1, 1, 1, 1)


class VAETraining(ReconstructionTraining):
    """A stage that trains the VAE."""

    part = "vae"

    def __init__(self, config: TrainingConfig, name: str, settings: VAEReconstructionStage, vae: VAE) -> None:
        super().__init__(config, name, settings, vae)
        self._vae, self._smooth_weight = vae, settings.smooth_weight

    @torch.no_grad()
    def outputs(self) -> Mapping[str, nn.Module]:
        """The VAE with normalised latents; call it once, after training."""
        clips = (make_clip(Split.TRAIN, seed, CLIP_BLOCKS, self._stream.height) for seed in range(STATISTICS_CLIPS))
        latents = torch.cat([reconstruct(self._vae, self._served(clip), Streams())[1] for clip in clips], dim=2)
        fold(self._vae, latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4)))
        return {"vae": self._vae}

    def _shown(self, video: Tensor) -> Tensor:
        return reconstruct(self._vae, video, Streams())[0]

    def _learn_video(self, video: Tensor, weights: Tensor, draw: torch.Generator, shares: int) -> dict[str, float]:
        with torch.autocast("cpu", torch.bfloat16):  # torch's 3-D convolutions in float32 are ten times slower
            made, latents = reconstruct(self._vae, video, Streams())
        return self._descend(made, video, latents, weights, shares)

    def _descend(self, made: Tensor, true: Tensor, latents: Tensor, weights: Tensor, shares: int) -> dict[str, float]:
        error = (made - true).abs()
        loss = (weights * self._penalty(error)).mean() + self._smooth_weight * latents.square().mean()
        (loss / shares).backward()
        return {"loss": loss.item(), "error": error.mean().item()}

    def _learn_stills(self, draw: torch.Generator) -> list[dict[str, float]]:
        side = self._stream.height
        video = pixels(np.stack([draw_still(draw, side) for _ in range(self._settings.still_batch)]))
        stills = video.transpose(0, 2)  # [batch, 3, 1, H, W]
        with sdpa_kernel(SDPBackend.MATH):  # the version that vmap can batch
            made, latents = torch.vmap(self._first)(stills)
        return [self._descend(made, stills, latents, self._weights, 1)]

    def _first(self, still: Tensor) -> tuple[Tensor, Tensor]:
        """[3, 1, H, W] as the first frame of a stream, and its latent."""
        made, latent = reconstruct(self._vae, still[None], Streams())
        return made[0], latent[0]


def make_stage(config: TrainingConfig) -> VAETraining:
    """The first stage."""
    return VAETraining(config, STAGE, config.vae, fresh_vae(config.system.vae, generator(config.seed, STAGE, "start")))


def make_mouth_stage(config: TrainingConfig, out: Path) -> VAETraining:
    """The second stage, on the first stage's VAE in the run's folder `out`. Raises `CheckpointError`."""
    vae = VAE(config.system.vae)
    load_weights(out / VAE_FILE, vae, trainable=True)
    return VAETraining(config, MOUTHS, config.mouths, channels_last(vae))
