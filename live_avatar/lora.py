"""Low-rank adapters: read, checked against the network, and merged as tensors are read (spec section 14).

W' = W + alpha / rank * B A in float32, rounded once to the type of W. Knows names and tensors; knows no preset.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from live_avatar.errors import CheckpointError
from live_avatar.weights import SafetensorsWeights, Shapes, Weights

PREFIX = "base_model.model."
TARGET = re.compile(r"\.(q|k|v|o|ffn\.0|ffn\.2)$")
FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight$")


@dataclass(frozen=True)
class LoRA:
    """An adapter file. `rank` and `alpha` None: taken from the file, or from `adapter_config.json` beside it."""

    path: Path
    rank: int | None = None
    alpha: float | None = None


@dataclass(frozen=True)
class _Adapter:
    """Where in the file the factors of every module stand, and tensors that replace the network's own."""

    factors: Mapping[str, dict[str, str]] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)


class MergedWeights:
    """Weights with an adapter merged into each tensor when it is read.

    Raises `CheckpointError` at once for a key that belongs to no tensor, a factor without its partner, wrong shapes,
    and a rank or alpha that is unknown or contradicted.
    """

    def __init__(self, base: Weights, lora: LoRA) -> None:
        self._base = base
        self._file = SafetensorsWeights(lora.path)
        self.origin = f"{base.origin} with {lora.path}"
        self.files: Sequence[Path] = (*base.files, lora.path)
        self._adapter = _sorted(self._file, base.shapes())
        rank = _rank(self._file, self._adapter, base.shapes())
        if lora.rank not in (None, rank):
            raise CheckpointError(f"{lora.path} has rank {rank}, not {lora.rank}; leave the rank out.")
        self.scale = _alpha(self._file, lora) / rank if self._adapter.factors else 0.0

    @property
    def merged(self) -> Sequence[str]:
        """Names of the tensors that the adapter changes."""
        return sorted([*(f"{module}.weight" for module in self._adapter.factors), *self._adapter.whole])

    def shapes(self) -> Shapes:
        return self._base.shapes()

    def read(self, name: str) -> Tensor:
        whole = self._adapter.whole.get(name)
        tensor = self._base.read(name) if whole is None else self._file.read(whole).to(self._base.read(name).dtype)
        factors = self._adapter.factors.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if factors is None:
            return tensor
        down, up = self._file.read(factors["A"]).float(), self._file.read(factors["B"]).float()
        return tensor.float().addmm_(up, down, alpha=self.scale).to(tensor.dtype)


def _sorted(file: SafetensorsWeights, shapes: Shapes) -> _Adapter:
    """Assigns every key of the file to a tensor of the network, in both styles of key."""
    factors: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for key in file.shapes():
        name = key.removeprefix(PREFIX)
        match = FACTOR.match(name)
        if match and f"{match['module']}.weight" in shapes and TARGET.search(match["module"]):
            factors.setdefault(match["module"], {})[match["side"]] = key
        elif name.replace(".base_layer.", ".") in shapes:
            whole[name.replace(".base_layer.", ".")] = key
        else:
            raise CheckpointError(
                f"{file.origin} has key {key!r}, which belongs to no adapted layer (q, k, v, o, ffn.0, ffn.2) and to "
                "no tensor of the network; is the adapter of another model?"
            )
    for sides in factors.values():
        if len(sides) < 2:
            raise CheckpointError(
                f"{file.origin} has {next(iter(sides.values()))!r} without its other factor; fetch the whole file."
            )
    if not factors and not whole:
        raise CheckpointError(f"{file.origin} holds no tensors; expected an adapter.")
    return _Adapter(factors, whole)


def _rank(file: SafetensorsWeights, adapter: _Adapter, shapes: Shapes) -> int:
    """The rank of all factors, 0 if there are none; every shape is checked against the weights."""
    given = file.shapes()
    rank = next((given[sides["A"]][0] for sides in adapter.factors.values()), 0)
    for module, sides in adapter.factors.items():
        out_features, in_features = shapes[f"{module}.weight"]
        for side, expected in (("A", (rank, in_features)), ("B", (out_features, rank))):
            if given[sides[side]] != expected:
                raise CheckpointError(
                    f"{file.origin}: {sides[side]!r} has shape {list(given[sides[side]])}, expected {list(expected)}; "
                    "is the adapter of another model?"
                )
    for name, key in adapter.whole.items():
        if given[key] != shapes[name]:
            raise CheckpointError(
                f"{file.origin}: {key!r} has shape {list(given[key])}, expected {list(shapes[name])}; "
                "is the adapter of another model?"
            )
    return rank


def _alpha(file: SafetensorsWeights, lora: LoRA) -> float:
    beside = lora.path.with_name("adapter_config.json")
    stated = file.metadata.get("lora_alpha", file.metadata.get("alpha"))
    try:
        if stated is None and beside.is_file():
            stated = json.loads(beside.read_text())["lora_alpha"]
        known = None if stated is None else float(stated)
        if known is not None and not 0 < known < math.inf:
            raise ValueError(f"it is {known}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{lora.path}: its lora_alpha cannot be read ({error!r}); give --lora-alpha.") from error
    if lora.alpha is not None:
        return lora.alpha
    if known is None:
        raise CheckpointError(
            f"{lora.path} does not say its alpha, and there is no {beside.name} beside it; give --lora-alpha "
            "(64 for the released adapter of rank 128)."
        )
    return known
