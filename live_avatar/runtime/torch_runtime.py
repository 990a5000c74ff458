"""The torch modules themselves as graphs: the oracle of the tests, and `generate` without artifacts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from live_avatar.arrays import Array, Arrays
from live_avatar.checkpoint import load_networks
from live_avatar.components import build_components
from live_avatar.config import Preset
from live_avatar.contract import Contract, contracts


class TorchGraph:
    """One component in eager torch."""

    def __init__(self, module: nn.Module, contract: Contract) -> None:
        self._module = module
        self._contract = contract

    def run(self, inputs: Arrays) -> dict[str, Array]:
        tensors = [torch.from_numpy(np.ascontiguousarray(inputs[spec.name])) for spec in self._contract.inputs]
        with torch.inference_mode():
            results = self._module(*tensors)
        results = results if isinstance(results, tuple) else (results,)
        return {spec.name: r.numpy() for spec, r in zip(self._contract.outputs, results, strict=True)}


class TorchRuntime:
    """All components of a preset, with the weights of `checkpoint` or the preset's random ones."""

    def __init__(self, preset: Preset, checkpoint: Path | None = None) -> None:
        self.preset = preset
        self._contracts = contracts(preset)
        self._components = build_components(preset, load_networks(preset, checkpoint))

    def graph(self, component: str) -> TorchGraph:
        return TorchGraph(self._components[component], self._contracts[component])
