"""The external weights of several graphs in one file, each tensor once and one in memory at a time.

The four steps and the prefill share the transformer's weights; a tensor is known by its name in the state dict.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import onnx_ir as ir
import torch
from torch import Tensor

ALIGNMENT = 4096  # so that a tensor can be memory-mapped


class WeightFile:
    """An external data file being written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._placed: dict[str, tuple[int, int]] = {}  # offset and bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def place(self, key: str, value: ir.Value, read: Callable[[], bytes | memoryview]) -> ir.ExternalTensor:
        """Where the tensor `key` stands in the file, for the initializer `value`; it is read and written once.

        Initializers of other shapes may share it: zeros of two shapes can have the same bytes.
        """
        assert value.dtype is not None
        if key not in self._placed:
            offset = -(-self._file.tell() // ALIGNMENT) * ALIGNMENT
            self._file.write(b"\0" * (offset - self._file.tell()))
            data = read()
            self._file.write(data)
            self._placed[key] = offset, len(data)
        offset, length = self._placed[key]
        return ir.ExternalTensor(
            self._path.name,
            offset,
            length,
            value.dtype,
            shape=ir.Shape(value.shape or ()),
            name=value.name or key,
            base_dir=self._path.parent,
        )


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's memory, row by row; numpy has no bfloat16, so it is seen as bytes."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
