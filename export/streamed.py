"""Networks whose linears have their weights only while they run, on any device.

A transformer needs the memory of one linear then, and not that of all its layers. Every run reads the weights again.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from live_avatar.model.networks import Networks, meta_networks, replace_parameters
from live_avatar.weights.tensors import Checkpoint, Weights


def streamed_networks(checkpoint: Checkpoint, device: torch.device, keep_bytes: int = 0) -> Networks:
    """Networks on `device`, in the types of the preset.

    Norms, biases, convolutions and embeddings stay there. So do linears, in the order of the networks, as far as
    `keep_bytes` goes; the weights of all others are read from the checkpoint for every run.
    """
    networks = meta_networks(checkpoint.preset)
    for part, network in networks.parts().items():
        streamed: dict[str, nn.Linear] = {}
        for name, module in network.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            if module.weight.nbytes <= keep_bytes:
                keep_bytes -= module.weight.nbytes
            else:
                streamed[f"{name}.weight"] = module
        _place(network, checkpoint.parts[part], device, streamed)
    return networks


def _place(network: nn.Module, weights: Weights, device: torch.device, streamed: dict[str, nn.Linear]) -> None:
    def read(name: str, parameter: Tensor) -> Tensor:
        return weights.read(name).to(device, parameter.dtype)

    replace_parameters(network, lambda name, parameter: parameter if name in streamed else read(name, parameter))
    for module in network.modules():
        module._buffers.update(
            {name: buffer.to(device) for name, buffer in module._buffers.items() if buffer is not None}
        )
    for name, linear in streamed.items():
        linear.register_forward_pre_hook(partial(_fetch, partial(read, name)))
        linear.register_forward_hook(_drop)


def _fetch(read: Any, linear: nn.Linear, _: Any) -> None:
    linear.weight = nn.Parameter(read(linear.weight), requires_grad=False)


def _drop(linear: nn.Linear, _inputs: Any, _output: Any) -> None:
    linear.weight = nn.Parameter(linear.weight.to("meta"), requires_grad=False)
