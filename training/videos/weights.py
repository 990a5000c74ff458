"""Networks of others that measures of real video need, from local files: none is shipped or fetched.

`SOURCES` says where each file comes from. A file that is not there leaves its columns empty.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from live_avatar.arrays import Array
from live_avatar.errors import CheckpointError
from training.videos.syncnet import SyncNet, load_syncnet

SYNCNET, INCEPTION, I3D, DINO = "syncnet_v2.model", "inception-2015-12-05.pt", "i3d_torchscript.pt", "dino-vits16"
SOURCES: Mapping[str, str] = {
    SYNCNET: "download_model.sh of github.com/joonson/syncnet_python",
    INCEPTION: "TorchScript, metrics of github.com/NVlabs/stylegan2-ada-pytorch",
    I3D: "TorchScript, FVD of github.com/universome/stylegan-v",
    DINO: "the folder of huggingface.co/facebook/dino-vits16",
}
VIEW = 224  # pixels of DINO and I3D
FVD_FRAMES = 16
BATCH = 16
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class MetricWeights:
    """The networks that there are. missing: names of the files that are not."""

    syncnet: SyncNet | None
    inception: Any
    i3d: Any
    dino: Any
    missing: tuple[str, ...]

    @torch.no_grad()
    def inception_features(self, frames: Array) -> Array:
        """Features of frames uint8 [n, H, W, 3], [n, 2048]."""
        made = [
            self.inception(torch.from_numpy(piece).permute(0, 3, 1, 2), return_features=True)
            for piece in _pieces(frames)
        ]
        return torch.cat(made).numpy()

    @torch.no_grad()
    def i3d_features(self, frames: Array) -> Array:
        """Features of every whole run of 16 frames, uint8 [n, H, W, 3] -> [n // 16, 400]."""
        video = viewed(frames) / 127.5 - 1  # [n, 3, 224, 224]
        runs = video[: len(video) // FVD_FRAMES * FVD_FRAMES].unflatten(0, (-1, FVD_FRAMES)).transpose(1, 2)
        made = [self.i3d(run[None], rescale=False, resize=False, return_features=True) for run in runs]
        return torch.cat(made).numpy()

    @torch.no_grad()
    def dino_features(self, frames: Array) -> Array:
        """The class token of frames uint8 [n, H, W, 3], unit length, [n, d]."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        made = [
            self.dino(pixel_values=(viewed(piece) / 255 - mean) / std).last_hidden_state[:, 0]
            for piece in _pieces(frames)
        ]
        return torch.nn.functional.normalize(torch.cat(made), dim=1).numpy()


def _pieces(frames: Array) -> list[Array]:
    return [frames[start : start + BATCH] for start in range(0, len(frames), BATCH)]


def viewed(frames: Array) -> Tensor:
    """The middle square of frames uint8 [n, H, W, 3] at 224 x 224: float32 [n, 3, 224, 224], 0..255."""
    return torch.from_numpy(squares(frames)).permute(0, 3, 1, 2).float()


def squares(frames: Array) -> Array:
    """The middle square of frames uint8 [n, H, W, 3], uint8 [n, 224, 224, 3]."""
    side = min(frames.shape[1:3])
    top, left = (frames.shape[1] - side) // 2, (frames.shape[2] - side) // 2
    box = (left, top, left + side, top + side)
    size, filter_ = (VIEW, VIEW), Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, filter_, box=box)) for frame in frames])


def load_weights(folder: Path | None) -> MetricWeights:
    """The networks whose files are in a folder. Raises `CheckpointError` for a file that is another one."""
    if folder is not None and not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; give the folder with the weights of the measures.")
    found = {name: folder / name for name in SOURCES if folder is not None and (folder / name).exists()}
    return MetricWeights(
        syncnet=load_syncnet(found[SYNCNET]) if SYNCNET in found else None,
        inception=_scripted(found[INCEPTION]) if INCEPTION in found else None,
        i3d=_scripted(found[I3D]) if I3D in found else None,
        dino=_transformer(found[DINO]) if DINO in found else None,
        missing=tuple(name for name in SOURCES if name not in found),
    )


def _scripted(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the files exist in this format only
            return torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} is no TorchScript file ({reason}); fetch it again: {SOURCES[path.name]}."
        ) from error


def _transformer(path: Path) -> Any:
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        return AutoModel.from_pretrained(str(path), local_files_only=True).eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} holds no network of transformers ({reason}); fetch it again: {SOURCES[path.name]}."
        ) from error
