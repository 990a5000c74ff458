"""The transformer at the start of a stage (spec section 2): with new weights, or those of an earlier stage.

It is always float32, whatever the preset's precision is.
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

# Layers that start at 0 (the original's `zero_init`): speech and pose have no effect at first, and the first velocities
# are 0.
SILENT = re.compile(
    r"head\.head\.|cond_encoder\.|audio_injector\.(injector\.\d+\.o|injector_adain_layers\.\d+\.linear)\."
)
MASK_STD = 0.02


def fresh(config: DiTConfig, draw: torch.Generator) -> CausalDiT:
    """A network with random weights.

    Linears and convolutions follow Xavier's rule. The embeddings of text and time do, too: the original's deviation of
    0.02 is about the same at its width, but too small for a narrow network.
    """
    dit = _empty(config)
    with torch.no_grad():
        for name, parameter in dit.named_parameters():
            _draw(name, parameter, draw)
    return dit


def load(config: DiTConfig, out: Path, stage: str) -> CausalDiT:
    """The network of a stage of the run in `out`. Raises `TrainingError` if it is missing, or `CheckpointError`."""
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
