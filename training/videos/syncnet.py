"""SyncNet (Chung and Zisserman, 2016): whether lips and speech belong together, as Sync-C and Sync-D.

The network, its front end and both figures are those of the authors' `syncnet_python`, whose weights are
`syncnet_v2.model`. A window is 5 frames of 224 x 224 pixels and 20 columns of MFCC. Sync-D is the mean distance of
lips and speech at the best offset, Sync-C the median over offsets minus that.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from live_avatar.arrays import Array
from live_avatar.config import SAMPLE_RATE_HZ
from live_avatar.errors import CheckpointError, InputError

SIDE = 224  # pixels
WINDOW_FRAMES, WINDOW_COLUMNS, COLUMNS_PER_FRAME = 5, 20, 4
MOST_OFFSET = 15
"""Frames on either side in which the best offset is sought."""
BATCH = 20  # windows at once
WIDTH = 1024

# The front end, `mfcc` of python_speech_features with its defaults.
FRAME, STEP, FFT, FILTERS, CEPSTRA, LIFTER, EMPHASIS = 400, 160, 512, 26, 13, 22, 0.97


def _conv2d(inputs: int, outputs: int, kernel: tuple[int, int], padding: tuple[int, int]) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, padding=padding), nn.BatchNorm2d(outputs), nn.ReLU()]


def _conv3d(inputs: int, outputs: int, kernel: tuple[int, ...], stride: int, padding: int) -> list[nn.Module]:
    size, steps, pads = (kernel[0], kernel[1], kernel[2]), (1, stride, stride), (0, padding, padding)
    return [nn.Conv3d(inputs, outputs, size, steps, pads), nn.BatchNorm3d(outputs), nn.ReLU()]


def _head(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, width))


class SyncNet(nn.Module):
    """Embeddings of lips and of speech; parameters under the names of the released file."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.netcnnaud = nn.Sequential(
            *_conv2d(1, 64, (3, 3), (1, 1)), nn.MaxPool2d((1, 1), (1, 1)),
            *_conv2d(64, 192, (3, 3), (1, 1)), nn.MaxPool2d((3, 3), (1, 2)),
            *_conv2d(192, 384, (3, 3), (1, 1)), *_conv2d(384, 256, (3, 3), (1, 1)),
            *_conv2d(256, 256, (3, 3), (1, 1)), nn.MaxPool2d((3, 3), (2, 2)),
            *_conv2d(256, 512, (5, 4), (0, 0)),
        )  # fmt: skip
        self.netcnnlip = nn.Sequential(
            *_conv3d(3, 96, (5, 7, 7), 2, 0), nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *_conv3d(96, 256, (1, 5, 5), 2, 1), nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
            *_conv3d(256, 256, (1, 3, 3), 1, 1), *_conv3d(256, 256, (1, 3, 3), 1, 1),
            *_conv3d(256, 256, (1, 3, 3), 1, 1), nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *_conv3d(256, 512, (1, 6, 6), 1, 0),
        )  # fmt: skip
        self.netfcaud, self.netfclip = _head(width), _head(width)

    def speech(self, columns: Tensor) -> Tensor:
        """MFCC [n, 1, 13, 20] -> [n, width]."""
        return self.netfcaud(self.netcnnaud(columns).flatten(1))

    def lips(self, frames: Tensor) -> Tensor:
        """Frames [n, 3, 5, 224, 224], blue first, 0..255 -> [n, width]."""
        return self.netfclip(self.netcnnlip(frames).flatten(1))


def load_syncnet(path: Path) -> SyncNet:
    """The network with the weights of a file, which runs no code. Raises `CheckpointError` for another file."""
    fetch = "fetch syncnet_v2.model of syncnet_python"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        network = SyncNet(state["netfclip.3.weight"].shape[0])
        network.load_state_dict(state)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} does not hold the weights of SyncNet ({reason}); {fetch}.") from error
    return network.eval()


@dataclass(frozen=True)
class Sync:
    """Agreement of sound and picture.

    The confidence is Sync-C, and the distance is Sync-D. The picture is late by `offset` frames.
    """

    confidence: float
    distance: float
    offset: int


@torch.no_grad()
def measure_sync(network: SyncNet, faces: Array, speech: Array, most_offset: int = MOST_OFFSET) -> Sync:
    """Both figures of a clip: faces uint8 [n, 224, 224, 3], red first; speech int16 [n * 640].

    Raises `InputError` for fewer than 6 frames.
    """
    count = len(faces) - WINDOW_FRAMES
    if count < 1:
        raise InputError(f"{len(faces)} frames are too few for SyncNet; give at least {WINDOW_FRAMES + 1}.")
    columns = torch.from_numpy(mfcc(speech)).float()
    pixels = torch.from_numpy(np.ascontiguousarray(faces[..., ::-1])).permute(3, 0, 1, 2)
    lips, heard = [], []
    for start in range(0, count, BATCH):
        frames = range(start, min(start + BATCH, count))
        lips.append(network.lips(torch.stack([pixels[:, i : i + WINDOW_FRAMES] for i in frames]).float()))
        heard.append(
            network.speech(
                torch.stack([columns[:, COLUMNS_PER_FRAME * i :][:, :WINDOW_COLUMNS] for i in frames])[:, None]
            )
        )
    return figures(torch.cat(lips), torch.cat(heard), most_offset)


def figures(lips: Tensor, heard: Tensor, most_offset: int) -> Sync:
    """Figures of embeddings [n, width] each; speech beyond the ends is zeros, as in the original."""
    padded = F.pad(heard, (0, 0, most_offset, most_offset))
    shifts = range(2 * most_offset + 1)
    means = torch.stack([F.pairwise_distance(lips, padded[shift : shift + len(lips)]).mean() for shift in shifts])
    least, at = means.min(0)
    return Sync((means.median() - least).item(), least.item(), most_offset - int(at))


def mfcc(speech: Array) -> Array:
    """Mel-frequency cepstra of int16 [n], 100 columns a second: float64 [13, columns]."""
    signal = speech.astype(np.float64)
    signal = np.append(signal[:1], signal[1:] - EMPHASIS * signal[:-1])
    columns = 1 + max(0, -(-(len(signal) - FRAME) // STEP))
    padded = np.pad(signal, (0, max(0, (columns - 1) * STEP + FRAME - len(signal))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, FRAME)[::STEP][:columns]
    power = np.square(np.abs(np.fft.rfft(frames, FFT))) / FFT  # [columns, 257]
    energy, least = power.sum(1), np.finfo(float).eps
    bands = power @ _mel_filters().T
    logarithms = np.log(np.where(bands == 0, least, bands))
    angles = np.pi * np.arange(CEPSTRA)[:, None] * (2 * np.arange(FILTERS) + 1) / (2 * FILTERS)
    scale = np.where(np.arange(CEPSTRA) == 0, np.sqrt(1 / FILTERS), np.sqrt(2 / FILTERS))
    cepstra = (logarithms @ np.cos(angles).T) * scale * (1 + LIFTER / 2 * np.sin(np.pi * np.arange(CEPSTRA) / LIFTER))
    cepstra[:, 0] = np.log(np.where(energy == 0, least, energy))
    made: Array = cepstra.T
    return made


def _mel_filters() -> Array:
    """Triangles over the bins of the spectrum, [26, 257]."""
    highest = 2595 * np.log10(1 + SAMPLE_RATE_HZ / 2 / 700)
    hertz = 700 * (10 ** (np.linspace(0, highest, FILTERS + 2) / 2595) - 1)
    edges = np.floor((FFT + 1) * hertz / SAMPLE_RATE_HZ)
    bins = np.arange(FFT // 2 + 1)
    filters = np.zeros((FILTERS, len(bins)))
    for index, (low, middle, high) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
        rising, falling = (bins >= low) & (bins < middle), (bins >= middle) & (bins < high)
        filters[index, rising] = (bins[rising] - low) / (middle - low)
        filters[index, falling] = (high - bins[falling]) / (high - middle)
    return filters
