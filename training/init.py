"""A transformer to begin training with (spec section 2): fresh weights, or those that an earlier stage left.

Always float32, whatever type the preset serves in.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from live_avatar.config import DiTConfig
from live_avatar.model.dit import CausalDiT
from training.checkpoints import load_weights
from training.errors import TrainingError

# What adds nothing at first (the original's `zero_init`): speech and pose come in as they are learnt, and the first
# velocities are 0.
SILENT = re.compile(
    r"head\.head\.|cond_encoder\.|audio_injector\.(injector\.\d+\.o|injector_adain_layers\.\d+\.linear)\."
)
MASK_STD = 0.02


def fresh(config: DiTConfig, draw: torch.Generator) -> CausalDiT:
    """A network with drawn weights.

    Linears and convolutions are drawn as xavier's rule says. So are the embeddings of text and time: the original's
    deviation of 0.02 is about that at its width, and would nearly mute them at a small one.
    """
    dit = _empty(config)
    with torch.no_grad():
        for name, parameter in dit.named_parameters():
            _draw(name, parameter, draw)
    return dit


def load(config: DiTConfig, out: Path, stage: str) -> CausalDiT:
    """The network that a stage of the run in `out` left. Raises `TrainingError` if it did not, `CheckpointError`."""
    path = out / stage / "dit.safetensors"
    if not path.is_file():
        raise TrainingError(f"{path} does not exist; train it with --stage {stage} and the same --config, --out.")
    dit = _empty(config)
    load_weights(path, dit, trainable=True)
    return dit


def _empty(config: DiTConfig) -> CausalDiT:
    with torch.device("meta"):
        dit = CausalDiT(config)
    return dit.to_empty(device="cpu")


def _draw(name: str, parameter: Tensor, draw: torch.Generator) -> None:
    if SILENT.match(name) or name.endswith("padding_tokens"):
        parameter.zero_()
    elif name.endswith("modulation"):
        parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=draw)
    elif name == "trainable_cond_mask.weight":
        parameter.normal_(std=MASK_STD, generator=draw)
    elif name == "casual_audio_encoder.weights" or ("norm" in name and name.endswith("weight")):
        parameter.fill_(1)
    elif name.endswith("bias"):
        parameter.zero_()
    else:
        nn.init.xavier_uniform_(parameter.view(parameter.shape[0], -1), generator=draw)
