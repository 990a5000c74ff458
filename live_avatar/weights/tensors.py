"""The weights of a network as named tensors, read one at a time.

A `Weights` knows the names and shapes of its tensors without reading them; `read` brings one into memory. So a model of
any size can be checked, merged and exported with room for one tensor. Files are memory-mapped. A `Checkpoint` gathers
those of a preset; `checkpoint.py` says which files make which network.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from live_avatar.config import Preset
from live_avatar.errors import CheckpointError
from live_avatar.json_files import read_json
from live_avatar.model.networks import meta_networks

Shapes = Mapping[str, tuple[int, ...]]


class Weights(Protocol):
    """Tensors of one network under the names of its state dict."""

    @property
    def origin(self) -> str:
        """What the tensors are read from, for a sentence."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """Every file that is read, for the manifest; none for weights that are not from files."""
        ...

    def shapes(self) -> Shapes:
        """Names and shapes; reads no tensor."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, in the type it is stored in."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """Weights of every network of a preset by part (`dit`, `vae`, `speech`, `text`), and the tokenizer's file."""

    preset: Preset
    parts: Mapping[str, Weights]
    tokenizer: Path | None = None


class RandomWeights:
    """Weights drawn from a seed: the same on every machine, each tensor a function of its own name.

    They keep activations of size about 1.
    """

    files: Sequence[Path] = ()

    def __init__(self, shapes: Shapes, seed: int) -> None:
        self.origin = f"random weights of seed {seed}"
        self._shapes = shapes
        self._seed = seed

    def shapes(self) -> Shapes:
        return self._shapes

    def read(self, name: str) -> Tensor:
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        return _drawn(name, torch.randn(self._shapes[name], generator=generator))


def _drawn(name: str, noise: Tensor) -> Tensor:
    """Scales in place: the largest tensors take gigabytes."""
    if name.endswith(("gamma", "original0")) or ("norm" in name and name.endswith("weight")):
        return noise.mul_(0.1).add_(1)
    if noise.dim() < 2:
        return noise.mul_(0.1)
    if noise.dim() == 2 or name.endswith(("weight", "original1")):
        return noise.mul_(noise[0].numel() ** -0.5)
    return noise.mul_(0.3)


class SafetensorsWeights:
    """One safetensors file, or the shards of an index."""

    def __init__(self, path: Path) -> None:
        self.origin = str(path)
        self._path = path

    @cached_property
    def _placed(self) -> Mapping[str, Path]:
        """The file of every tensor."""
        if self._path.suffix != ".json":
            with _opened(self._path) as file:
                return dict.fromkeys(file.keys(), self._path)
        try:
            index = read_json(self._path)["weight_map"]
            placed = {str(name): self._path.parent / str(file) for name, file in index.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{self._path} is not an index of safetensors files ({error}); fetch it again."
            ) from error
        held = {}
        for path in sorted(set(placed.values())):
            with _opened(path) as file:
                held[path] = set(file.keys())
        for name, path in placed.items():
            if name not in held[path]:
                raise CheckpointError(f"{path} lacks tensor {name!r} of {self._path.name}; fetch both again.")
        for path, names in held.items():
            for name in sorted(names):
                if placed.get(name) != path:
                    raise CheckpointError(
                        f"{path} has tensor {name!r}, which {self._path.name} does not place there; fetch both again."
                    )
        return placed

    @property
    def files(self) -> Sequence[Path]:
        index = [self._path] if self._path.suffix == ".json" else []
        return [*index, *sorted(set(self._placed.values()))]

    @cached_property
    def metadata(self) -> Mapping[str, str]:
        """The free text of the file's header; of the last shard's, where there are several."""
        with _opened(self.files[-1]) as file:
            return file.metadata() or {}

    def shapes(self) -> Shapes:
        return self._shapes

    @cached_property
    def _shapes(self) -> Shapes:
        shapes: dict[str, tuple[int, ...]] = {}
        for path in sorted(set(self._placed.values())):
            with _opened(path) as file:
                names = [name for name, place in self._placed.items() if place == path]
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
        return shapes

    def read(self, name: str) -> Tensor:
        with _opened(self._placed[name]) as file:  # the mapping goes with the file, or pages read would pile up
            return file.get_tensor(name).clone()


def _opened(path: Path) -> Any:
    """A memory-mapped safetensors file. Raises `CheckpointError` if there is none."""
    if not path.is_file():
        raise CheckpointError(
            f"checkpoint file {path} does not exist; expected a folder with {path.name} in it, whole as downloaded."
        )
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}); fetch it again.") from error


class TorchFileWeights:
    """A `.pth` file that holds a state dict, as `torch.save` makes it; memory-mapped, and no code in it is run."""

    def __init__(self, path: Path) -> None:
        self.origin = str(path)
        self.files: Sequence[Path] = (path,)

    @cached_property
    def _tensors(self) -> Mapping[str, Tensor]:
        path = self.files[0]
        if not path.is_file():
            raise CheckpointError(
                f"checkpoint file {path} does not exist; expected a folder with {path.name} in it, whole as downloaded."
            )
        try:
            loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path} holds objects that are no tensors, and code is not run; fetch the official file."
            ) from error
        except (RuntimeError, OSError, EOFError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{path} is not a whole torch file ({reason}); fetch it again.") from error
        if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
            raise CheckpointError(f"{path} holds no state dict, but {type(loaded).__name__}; fetch the official file.")
        return loaded

    def shapes(self) -> Shapes:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name].clone()


class RenamedWeights:
    """Weights under other names: `names` gives the stored name of every tensor that is offered."""

    def __init__(self, stored: Weights, names: Mapping[str, str]) -> None:
        self.origin = stored.origin
        self.files = stored.files
        self._stored = stored
        self._names = names

    def shapes(self) -> Shapes:
        stored = self._stored.shapes()
        return {name: stored[source] for name, source in self._names.items() if source in stored}

    def read(self, name: str) -> Tensor:
        return self._stored.read(self._names[name])


def shapes_of(module: nn.Module) -> Shapes:
    """Names and shapes of a network's state dict; the network may be on the meta device."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@cache
def network_shapes(preset: Preset) -> Mapping[str, Shapes]:
    """Names and shapes of the state dict of every network of a preset."""
    return {name: shapes_of(network) for name, network in meta_networks(preset).parts().items()}


def validate_tensors(weights: Weights, expected: Shapes) -> None:
    """Checks that every tensor is there, none is left over and all shapes agree; reads none.

    Raises `CheckpointError` that names the first tensor of the first fault found.
    """
    given = weights.shapes()
    for problem, names in (("lacks", expected.keys() - given.keys()), ("has unknown", given.keys() - expected.keys())):
        if names:
            raise CheckpointError(
                f"{weights.origin} {problem} {len(names)} tensors, such as {sorted(names)[0]!r}; "
                "is it of another preset?"
            )
    for name, shape in expected.items():
        if given[name] != shape:
            raise CheckpointError(
                f"{weights.origin}: tensor {name!r} has shape {list(given[name])}, expected {list(shape)}; "
                "is it of another preset?"
            )
