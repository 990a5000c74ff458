"""The torch modules themselves as graphs: the oracle of the tests, and `generate` without artifacts."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from live_avatar.arrays import Array, Arrays
from live_avatar.graphs.components import build_components
from live_avatar.graphs.contract import Contract, contracts
from live_avatar.graphs.memory import host_available_bytes
from live_avatar.inputs.text import make_tokenizer
from live_avatar.model.networks import Networks
from live_avatar.model.schedule import make_schedule
from live_avatar.runtime.host import host_zeros
from live_avatar.weights.checkpoint import load_networks
from live_avatar.weights.tensors import Checkpoint

CPU = torch.device("cpu")
TORCH_TYPES = {
    np.dtype(ml_dtypes.bfloat16): torch.bfloat16,
    np.dtype(ml_dtypes.float8_e4m3fn): torch.float8_e4m3fn,
}
"""Types that numpy and torch know each in its own way: arrays of them pass as integers."""


class TorchGraph:
    """One component in eager torch, on the device that has its weights."""

    def __init__(self, module: nn.Module, contract: Contract, device: torch.device) -> None:
        self._module = module
        self._contract = contract
        self._device = device

    def run(self, inputs: Arrays) -> dict[str, Array]:
        tensors = [to_torch(inputs[spec.name]).to(self._device) for spec in self._contract.inputs]
        with torch.inference_mode():
            results = self._module(*tensors)
        results = results if isinstance(results, tuple) else (results,)
        return {spec.name: to_numpy(r) for spec, r in zip(self._contract.outputs, results, strict=True)}


def to_torch(array: Array) -> Tensor:
    array = np.ascontiguousarray(array)
    if array.dtype in TORCH_TYPES:
        return torch.from_numpy(array.view(f"i{array.itemsize}")).view(TORCH_TYPES[array.dtype])
    return torch.from_numpy(array)


def to_numpy(tensor: Tensor) -> Array:
    tensor = tensor.cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


class TorchRuntime:
    """All components of a checkpoint, in networks that are given or loaded whole; arrays are the host's in any case."""

    zeros = staticmethod(host_zeros)
    free_bytes = staticmethod(host_available_bytes)

    def __init__(self, checkpoint: Checkpoint, networks: Networks | None = None, device: torch.device = CPU) -> None:
        self.preset = checkpoint.preset
        self.tokenizer = make_tokenizer(self.preset, checkpoint.tokenizer)
        self._contracts = contracts(self.preset)
        self._networks = networks or load_networks(checkpoint)
        self._device = device
        self._components = build_components(self.preset, self._networks)

    def modulation(self, step: int) -> dict[str, Array]:
        timestep = (0.0, *make_schedule(self.preset.stream).timesteps)[step]
        with torch.inference_mode():
            made = self._networks.dit.modulation(timestep)
        return {"modulation": to_numpy(made.layers), "head_modulation": to_numpy(made.head)}

    def graph(self, component: str) -> TorchGraph:
        return TorchGraph(self._components[component], self._contracts[component], self._device)
