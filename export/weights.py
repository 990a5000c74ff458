"""Weights of several graphs in one external file, each tensor once.

The four steps and the prefill share the transformer's weights; equal tensors are found by content, so
it does not matter how the exporter named or transposed them. Knows ONNX files only.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType
from typing import Self

import onnx
from onnx import TensorProto, external_data_helper, numpy_helper

LEAST_BYTES = 1024  # smaller tensors stay in the graph
ALIGNMENT = 4096  # so that a tensor can be memory-mapped


class SharedWeights:
    """An external data file being written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._places: dict[bytes, tuple[int, int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def move(self, model: onnx.ModelProto) -> None:
        """Moves the model's large initializers into the file; the model then refers to it by its name."""
        for tensor in model.graph.initializer:
            data = numpy_helper.to_array(tensor).tobytes()
            if len(data) >= LEAST_BYTES:
                offset, length = self._place(data)
                tensor.raw_data = b""  # set_external_data wants the field to be there
                external_data_helper.set_external_data(tensor, self._path.name, offset=offset, length=length)
                for field in ("raw_data", "float_data", "int64_data", "int32_data"):
                    tensor.ClearField(field)
                tensor.data_location = TensorProto.EXTERNAL

    def _place(self, data: bytes) -> tuple[int, int]:
        key = hashlib.sha256(data).digest()
        if key not in self._places:
            self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
            self._places[key] = (self._file.tell(), len(data))
            self._file.write(data)
        return self._places[key]
