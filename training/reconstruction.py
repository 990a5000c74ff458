"""What the stages that learn to give frames back have in common: pieces of drawn clips, the mouth's weight, the ruler.

Whole pictures do not teach a network to tell the four frames of one latent apart. These differ almost only in the
mouth, a sixth of the picture. So some stages also learn whole clips of the mouth's region.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from live_avatar.arrays import Array
from live_avatar.config import SPATIAL_STRIDE, TEMPORAL_STRIDE
from training.config import ReconstructionStage, TrainingConfig
from training.data.canvas import UNITS
from training.data.clips import SWAY, Clip, make_clip
from training.data.face import MOUTH_BOX, Face, Pose
from training.data.identity import draw_identity
from training.data.split import Split
from training.encoded import pixels
from training.logs import mean
from training.loop import clip_gradients, generator

CLIP_BLOCKS = 3
"""Length of the clips for frames; the head's sway grows in the first second."""
STILL_SHARE = 0.5
"""Share of clips that begin with the still picture, like every served stream."""
VALIDATION_CLIPS = 8
OPEN_SHARE = 0.6
"""Share of the stills whose mouth is open."""


def mouth_region(size: int) -> tuple[slice, slice]:
    """Rows and columns of a picture that contain the mouth, open or closed."""
    left, top, right, bottom = (round(edge * size / UNITS) for edge in MOUTH_BOX)
    return slice(top, bottom), slice(left, right)


def mouth_surroundings(size: int) -> tuple[slice, slice]:
    """Rows and columns, in pixels, of the latents' cells that overlap the mouth."""
    rows, columns = (
        slice(span.start // SPATIAL_STRIDE * SPATIAL_STRIDE, -(-span.stop // SPATIAL_STRIDE) * SPATIAL_STRIDE)
        for span in mouth_region(size)
    )
    return rows, columns


def draw_video(clip: Clip, frames: int, draw: torch.Generator) -> Tensor:
    """A piece of a clip, [1, 3, frames, H, W]: its start after the still picture, or any other."""
    if torch.rand((), generator=draw) < STILL_SHARE:
        return pixels(np.concatenate([clip.picture[None], clip.frames[: frames - 1]]))
    first = int(torch.randint(len(clip.frames) - frames + 1, (), generator=draw))
    return pixels(clip.frames[first : first + frames])


def draw_still(draw: torch.Generator, side: int) -> Array:
    """A training face in any pose and with any mouth, uint8 [side, side, 3]."""
    face = Face(draw_identity(Split.TRAIN, int(torch.randint(2**31, (), generator=draw))), side)
    opening, width, lid, x, y, angle, talks = torch.rand(7, generator=draw).tolist()
    return face.frame(
        Pose(
            opening=opening if talks < OPEN_SHARE else 0.0,
            width=width,
            lid=max(0.0, 5 * lid - 4),
            x=(2 * x - 1) * SWAY[0],
            y=(2 * y - 1) * SWAY[1],
            angle=(2 * angle - 1) * SWAY[2],
        )
    )


def psnr(made: Tensor, true: Tensor) -> float:
    """Peak signal to noise ratio in dB of pixels in -1..1."""
    return float(-10 * torch.log10((made - true).square().mean() / 4))


class ReconstructionTraining:
    """Shared base of the stages that learn to give frames back; see `training.loop.Stage`.

    The first `still_steps` steps learn single pictures, for the frames of a clip are too similar to learn colours and
    faces quickly. A later step learns `batch` pieces of clips, and `mouth_batch` whole clips that are cut to the mouth.
    """

    part: ClassVar[str]
    """Name of the trained network, and of its file in the stage's folder."""

    def __init__(self, config: TrainingConfig, name: str, settings: ReconstructionStage, network: nn.Module) -> None:
        self._settings = settings
        self._stream = config.system.stream
        self._key = (config.seed, name)
        self._weights = self._pixel_weights()
        self.modules: Mapping[str, nn.Module] = {self.part: network}
        self.optimizers: Mapping[str, Optimizer] = {
            self.part: AdamW(network.parameters(), weight_decay=settings.weight_decay)
        }

    def step(self, number: int) -> dict[str, float]:
        """One update. `loss` is the minimised loss, `error` the plain L1."""
        draw = generator(*self._key, number)
        self.optimizers[self.part].zero_grad()
        figures = self._learn(number, draw)
        norm = clip_gradients(list(self.modules[self.part].parameters()), self._settings.clip_norm)
        self.optimizers[self.part].step()
        return {**mean(figures), "gradient_norm": norm}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """PSNR in dB of streams of unseen faces after the decoder's warm-up, whole and around the mouth."""
        side = self._stream.height
        rows, columns = mouth_region(side)
        ratios = []
        for seed in range(VALIDATION_CLIPS):
            made, true = self._streamed(make_clip(Split.VALIDATION, seed, CLIP_BLOCKS, side))
            mouth = psnr(made[..., rows, columns], true[..., rows, columns])
            ratios.append({"psnr": psnr(made, true), "mouth_psnr": mouth})
        return mean(ratios)

    def outputs(self) -> Mapping[str, nn.Module]:
        """The network; call it once, after training."""
        return self.modules

    @property
    def _warm_up(self) -> int:
        """Number of frames of the still picture in the decoder's warm-up."""
        return 1 + TEMPORAL_STRIDE * (self._stream.decoder_warmup_latents - 1)

    def _pixel_weights(self) -> Tensor:
        """[H, W] of mean 1: `mouth_weight` around the mouth against 1 elsewhere."""
        weights = torch.ones(self._stream.height, self._stream.width)
        weights[mouth_region(self._stream.height)] = self._settings.mouth_weight
        return weights / weights.mean()

    def _served(self, clip: Clip) -> Tensor:
        """The clip as in a stream, after the still picture of the decoder's warm-up."""
        still = np.repeat(clip.picture[None], self._warm_up, axis=0)
        return pixels(np.concatenate([still, clip.frames]))

    def _streamed(self, clip: Clip) -> tuple[Tensor, Tensor]:
        """The frames that a stream shows, and the clip itself."""
        video = self._served(clip)
        return self._shown(video)[:, :, self._warm_up :].clamp(-1, 1), video[:, :, self._warm_up :]

    def _draw_clip(self, draw: torch.Generator) -> Clip:
        seed = int(torch.randint(2**31, (), generator=draw))
        return make_clip(Split.TRAIN, seed, CLIP_BLOCKS, self._stream.height)

    def _learn(self, number: int, draw: torch.Generator) -> list[dict[str, float]]:
        """Adds a step's gradients."""
        if number <= self._settings.still_steps:
            return self._learn_stills(draw)
        pieces, mouths = self._settings.batch, self._settings.mouth_batch
        figures = [self._learn_piece(draw, pieces + mouths) for _ in range(pieces)]
        return figures + [self._learn_mouth(draw, pieces + mouths) for _ in range(mouths)]

    def _learn_piece(self, draw: torch.Generator, shares: int) -> dict[str, float]:
        """Adds the gradient of a piece of a clip, with weight 1 / `shares`."""
        video = draw_video(self._draw_clip(draw), self._settings.frames, draw)
        return self._learn_video(video, self._weights, draw, shares)

    def _learn_mouth(self, draw: torch.Generator, shares: int) -> dict[str, float]:
        """Adds the gradient of the mouth's region in a whole clip, with weight 1 / `shares`."""
        clip = self._draw_clip(draw)
        rows, columns = mouth_surroundings(self._stream.height)
        video = pixels(np.concatenate([clip.picture[None], clip.frames]))[..., rows, columns]
        return self._learn_video(video, self._weights[rows, columns], draw, shares)

    def _learn_stills(self, draw: torch.Generator) -> list[dict[str, float]]:
        """Adds the gradient of a batch of first frames, each of another face."""
        count, side = self._settings.still_batch, self._stream.height
        stills = (pixels(draw_still(draw, side)[None]) for _ in range(count))
        return [self._learn_video(still, self._weights, draw, count) for still in stills]

    def _learn_video(self, video: Tensor, weights: Tensor, draw: torch.Generator, shares: int) -> dict[str, float]:
        """Adds the gradient of a video [1, 3, T, H, W] whose pixels count by `weights` [H, W]."""
        raise NotImplementedError

    def _shown(self, video: Tensor) -> Tensor:
        """The frames of a stream that a video [1, 3, T, H, W] goes through, not clamped."""
        raise NotImplementedError

    def _penalty(self, error: Tensor) -> Tensor:
        """The loss of absolute errors."""
        return error + self._settings.square_weight * error.square()
