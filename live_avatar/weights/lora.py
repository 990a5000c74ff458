"""Low-rank adapters: read, checked against the network, and merged as tensors are read (spec section 14).

W' = W + alpha / rank * B A in float32, rounded once to the type of W.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from live_avatar.errors import CheckpointError
from live_avatar.json_files import read_json
from live_avatar.model.linears import is_lora_target
from live_avatar.weights.tensors import SafetensorsWeights, Shapes, Weights

PREFIX = "base_model.model."
FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight$")


@dataclass(frozen=True)
class LoRA:
    """An adapter file.

    `alpha` None: as the file's header or `adapter_config.json` beside it says.
    """

    path: Path
    alpha: float | None = None


@dataclass(frozen=True)
class _Adapter:
    """Where in the file the factors of every module stand, and tensors that replace the network's own."""

    factors: Mapping[str, dict[str, str]] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)


class MergedWeights:
    """Weights with an adapter merged into each tensor when it is read.

    Raises `CheckpointError` at once for a key that belongs to no tensor or to one that has a key already, a factor
    without its partner, wrong shapes, and an alpha that is unknown or not positive.
    """

    def __init__(self, base: Weights, lora: LoRA) -> None:
        if not lora.path.is_file():
            raise CheckpointError(f"adapter {lora.path} is not a file; give the safetensors file of an adapter.")
        self._base = base
        self._file = SafetensorsWeights(lora.path)
        self.origin = f"{base.origin} with {lora.path}"
        self.files: Sequence[Path] = (*base.files, lora.path)
        self._adapter = _sorted(self._file, base.shapes())
        rank = _rank(self._file, self._adapter, base.shapes())
        self.scale = _alpha(self._file, lora) / rank if self._adapter.factors else 0.0

    @property
    def merged(self) -> Sequence[str]:
        """Names of the tensors that the adapter changes."""
        return sorted({*(f"{module}.weight" for module in self._adapter.factors), *self._adapter.whole})

    def shapes(self) -> Shapes:
        return self._base.shapes()

    def read(self, name: str) -> Tensor:
        base = self._base.read(name)
        whole = self._adapter.whole.get(name)
        tensor = base if whole is None else self._file.read(whole)
        factors = self._adapter.factors.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if factors is not None:
            down, up = self._file.read(factors["A"]).float(), self._file.read(factors["B"]).float()
            tensor = tensor.float().addmm_(up, down, alpha=self.scale)
        return tensor.to(base.dtype)


def _sorted(file: SafetensorsWeights, shapes: Shapes) -> _Adapter:
    """Assigns every key of the file to a tensor of the network, in both styles of key."""
    factors: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for key in file.shapes():
        name = key.removeprefix(PREFIX)
        match = FACTOR.match(name)
        if match and f"{match['module']}.weight" in shapes and is_lora_target(match["module"]):
            keys, part = factors.setdefault(match["module"], {}), match["side"]
        elif name.replace(".base_layer.", ".") in shapes:
            keys, part = whole, name.replace(".base_layer.", ".")
        else:
            raise CheckpointError(
                f"{file.origin} has key {key!r}, which belongs to no adapted layer (q, k, v, o, ffn.0, ffn.2) and to "
                "no tensor of the network; is the adapter of another model?"
            )
        if part in keys:
            raise CheckpointError(
                f"{file.origin} has keys {keys[part]!r} and {key!r} for one tensor; take the wrong one out."
            )
        keys[part] = key
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
    # At least 1, so that an empty factor has a wrong shape.
    rank = next((max((1, *given[sides["A"]][:1])) for sides in adapter.factors.values()), 0)
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


def _configured(path: Path) -> float:
    """The alpha of peft's `adapter_config.json`. Raises `CheckpointError` for other rules of scaling."""
    config = read_json(path)
    for rule in ("use_rslora", "alpha_pattern", "rank_pattern"):
        if config.get(rule):
            raise CheckpointError(
                f"{path} has {rule} {config[rule]!r}, but the scale here is alpha / rank for every layer; "
                "merge this adapter with peft."
            )
    return config["lora_alpha"]


def _alpha(file: SafetensorsWeights, lora: LoRA) -> float:
    beside = lora.path.with_name("adapter_config.json")
    stated = lora.alpha if lora.alpha is not None else file.metadata.get("lora_alpha", file.metadata.get("alpha"))
    if stated is None and not beside.is_file():
        raise CheckpointError(
            f"{lora.path} does not say its alpha, and there is no {beside.name} beside it; give --lora-alpha "
            "(64 for the released adapter of rank 128)."
        )
    try:
        alpha = float(_configured(beside) if stated is None else stated)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{lora.path}: its lora_alpha cannot be read ({error!r}); give --lora-alpha.") from error
    if not 0 < alpha < math.inf:
        raise CheckpointError(f"{lora.path}: lora_alpha is {alpha}, expected a positive number; give --lora-alpha.")
    return alpha
