"""Graphs that a run of the tests traces once, however many presets, weights and workers it has.

A traced graph has no weights, so it depends on its contract and the shapes of its networks alone. Tracing is most of
an export's time, and many tests export presets that differ in something else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from torch import Tensor, nn
from torch.onnx._internal.exporter import _registration

from live_avatar.exporter.tracing import TracedGraph, Tracer
from live_avatar.graphs.contract import Contract
from tests.support.artifacts import made_once

GRAPH = "graph.onnx"


def trace_once(factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on `Tracer.trace` gives what it gave before for the same contract and the same networks.

    What torch asks of onnxscript for each graph, the list of its operators, is made once as well.
    """
    trace = Tracer.trace
    operators = _registration.onnxscript_apis.get_torchlib_ops
    monkeypatch.setattr(_registration.onnxscript_apis, "get_torchlib_ops", cache(operators))

    def traced(tracer: Tracer, contract: Contract) -> TracedGraph:
        component, constants = tracer._components[contract.name], tracer._constants[contract.name]

        def make(folder: Path) -> None:
            _write(trace(tracer, contract), folder / GRAPH)

        key = hashlib.sha256(repr((contract, _settings(component))).encode()).hexdigest()[:16]
        return _read(made_once(factory, f"trace-{contract.name}-{key}", make) / GRAPH, constants)

    monkeypatch.setattr(Tracer, "trace", traced)


def _settings(component: nn.Module) -> list[tuple[str, Any, Any]]:
    """Everything that `forward` may depend on: of every module its type, attributes, and the shapes of its tensors."""
    return [
        (
            name,
            type(module).__qualname__,
            [(key, value) for key, value in vars(module).items() if not key.startswith("_")],
            [(key, tensor.shape, tensor.dtype) for key, tensor in _own_tensors(module)],
        )
        for name, module in component.named_modules()
    ]


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _write(graph: TracedGraph, path: Path) -> None:
    """As an ONNX file in which every weight is a place in a file that does not exist, under its name."""
    for name, value in graph.weights:
        assert value.dtype is not None
        assert value.shape is not None
        value.const_value = ir.ExternalTensor(name, 0, 0, value.dtype, shape=value.shape, name=str(value.name))
    onnx.save(ir.to_proto(graph.model), path)


def _read(path: Path, constants: Mapping[str, Tensor]) -> TracedGraph:
    model = ir.from_proto(onnx.load(path, load_external_data=False))
    weights = []
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            weights.append((str(value.const_value.location), value))
            value.const_value = None
    return TracedGraph(model, weights, constants)
