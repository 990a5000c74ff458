"""Files of a run that are complete at any time: the checkpoint that a stage resumes from, and finished weights.

A file is written under a temporary name and renamed, so a full disk or a kill leaves the older file unchanged. A
checkpoint records the identity of its run, and other runs refuse it.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from live_avatar.errors import CheckpointError
from live_avatar.model.networks import replace_parameters
from live_avatar.weights.tensors import SafetensorsWeights, shapes_of, validate_tensors
from training.distributed import load_network
from training.errors import TrainingError

FORMAT = 1
OS_ERROR = re.compile(r"os error (\d+)")  # as in safetensors' messages
State = dict[str, Any]


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a temporary file in the same folder, flushes it to the disk and renames it to `path`.

    Raises `TrainingError` if there is no room or no permission; then `path` is unchanged and no other file is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:  # also after Ctrl-C
        temporary.unlink(missing_ok=True)
        cause = os_error(error)
        if cause is None:
            raise
        older = "the older one is whole" if path.exists() else "there is none yet"
        remedy = "make room on that disk" if cause == errno.ENOSPC else "mend that"
        raise TrainingError(
            f"{path} cannot be written ({os.strerror(cause)}); {older}. {remedy.capitalize()} and run the same command "
            "again: it goes on from there."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Errors as `write_whole`."""
    write_whole(path, lambda place: _put(place, text))


def _put(place: Path, text: str) -> None:
    place.write_text(text)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a report as JSON. Errors as `write_whole`."""
    write_text(path, json.dumps(values, indent=1) + "\n")


def os_error(error: BaseException | None) -> int | None:
    """The errno behind an error of torch or safetensors, which wrap errors of the file system."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        told = OS_ERROR.search(str(error))
        if told:
            return int(told[1])
        error = error.__cause__ or error.__context__
    return None


def save_checkpoint(path: Path, identity: Mapping[str, Any], state: State) -> None:
    """Writes `state` (numbers, names, tensors) with the identity of its run. Errors as `write_whole`."""
    whole = {"format": FORMAT, "identity": dict(identity), **state}
    write_whole(path, lambda place: _save(whole, place))


def _save(whole: State, place: Path) -> None:
    """Saves through a Python file, because torch's own file does not report why a write failed."""
    with place.open("wb") as file:
        torch.save(whole, file)


def load_checkpoint(path: Path, identity: Mapping[str, Any]) -> State | None:
    """The last saved state, or None if there is no file; no code in it is run.

    Raises `CheckpointError` for a damaged file, and for another identity, with the first key that differs.
    """
    if not path.exists():
        return None
    again = f"remove {path.parent} to begin that stage anew"
    try:
        state: State = torch.load(path, map_location="cpu", weights_only=True)
        made_format, made_of = state["format"], state["identity"]
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is not a whole checkpoint ({reason}); {again}.") from error
    if made_format != FORMAT:
        raise CheckpointError(f"{path} has format {made_format}, expected {FORMAT}; {again}.")
    check_identity(str(path), made_of, identity, f"give the run's own settings, or {again}")
    return state


def check_identity(origin: str, made_of: Mapping[str, Any], identity: Mapping[str, Any], remedy: str) -> None:
    """Raises `CheckpointError` with the first key, in alphabetical order, in which two descriptions differ."""
    for key in sorted(made_of.keys() | identity.keys()):
        theirs, ours = made_of.get(key), identity.get(key)
        if theirs != ours:
            raise CheckpointError(f"{origin} was made with {key} {theirs!r}, but this run has {ours!r}; {remedy}.")


def restore(module: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Copies tensors into a module. Raises `CheckpointError` that names a missing, surplus or misshapen tensor."""
    validate_tensors(_Tensors(origin, tensors), shapes_of(module))
    load_network(module, tensors)


class _Tensors:
    """Tensors in memory as `Weights`."""

    files: tuple[Path, ...] = ()

    def __init__(self, origin: str, tensors: Mapping[str, Tensor]) -> None:
        self.origin = origin
        self._tensors = tensors

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def save_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a network's state dict as safetensors. Errors as `write_whole`."""
    apart = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    write_whole(path, lambda place: save_file(apart, place))


def load_weights(path: Path, module: nn.Module, trainable: bool = False) -> None:
    """Fills a network, which may be on the meta device, from a safetensors file. Raises `CheckpointError`."""
    weights = SafetensorsWeights(path)
    validate_tensors(weights, shapes_of(module))
    replace_parameters(module, lambda name, _: weights.read(name))
    module.requires_grad_(trainable)
