"""One torch component becomes one ONNX graph that keeps its contract.

Knows torch's exporter and ONNX; knows no preset and no folder.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from live_avatar.arrays import Array
from live_avatar.contract import Contract, TensorSpec
from live_avatar.errors import ExportError

OPSET = 23  # Attention and RMSNormalization as operators; read by TensorRT 10.15 and later


def random_inputs(contract: Contract, seed: int, extent: int = 1) -> dict[str, Array]:
    """Fresh inputs of a contract; symbolic dimensions take entry `extent` of (least, usual, greatest)."""
    generator = np.random.default_rng(seed)
    return {spec.name: _random(spec, contract, generator, extent) for spec in contract.inputs}


def _random(spec: TensorSpec, contract: Contract, generator: np.random.Generator, extent: int) -> Array:
    shape = [contract.ranges[d][extent] if isinstance(d, str) else d for d in spec.shape]
    if spec.dtype == "int64":
        return generator.integers(0, 2, shape, dtype=np.int64)
    return generator.standard_normal(shape, dtype=np.float32)


def export_graph(component: nn.Module, contract: Contract) -> onnx.ModelProto:
    """The component's graph at `OPSET`, weights inside. Raises `ExportError` if it does not keep the contract."""
    inputs = tuple(torch.from_numpy(array) for array in random_inputs(contract, seed=0).values())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports that torchvision is absent, per export
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            component,
            inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=[spec.name for spec in contract.inputs],
            output_names=[spec.name for spec in contract.outputs],
            dynamic_shapes=_dynamic_shapes(component, contract),
            verbose=False,
        )
    if program is None:
        raise ExportError(f"{contract.name}: torch.onnx.export gave no program; expected one at opset {OPSET}.")
    model = program.model_proto
    _keep_contract(model, contract)
    return model


def _dynamic_shapes(component: nn.Module, contract: Contract) -> dict[str, object] | None:
    """Torch's notation of the contract's symbolic dimensions, by the names of `forward`'s arguments."""
    if not contract.ranges:
        return None
    marks = iter(
        [{i: torch.export.Dim.DYNAMIC for i, d in enumerate(s.shape) if isinstance(d, str)} for s in contract.inputs]
    )
    parameters = inspect.signature(component.forward).parameters.values()
    return {p.name: tuple(marks) if p.kind == p.VAR_POSITIONAL else next(marks) for p in parameters}


def _keep_contract(model: onnx.ModelProto, contract: Contract) -> None:
    """Checks opset, names, types and fixed sizes, and gives symbolic dimensions the contract's names."""
    stamped = {opset.domain: opset.version for opset in model.opset_import}
    if stamped != {"": OPSET}:
        raise ExportError(
            f"{contract.name}: exported with opsets {stamped}, expected only the standard one at {OPSET}."
        )
    for side, values, specs in (
        ("input", model.graph.input, contract.inputs),
        ("output", model.graph.output, contract.outputs),
    ):
        if [value.name for value in values] != [spec.name for spec in specs]:
            raise ExportError(
                f"{contract.name}: {side}s are {[v.name for v in values]}, expected {[s.name for s in specs]}."
            )
        for value, spec in zip(values, specs, strict=True):
            _keep_spec(contract.name, value, spec)
    _strip(model)


def _strip(model: onnx.ModelProto) -> None:
    """Drops what the exporter leaves for debugging: its own dimension names, and stack traces with paths."""
    del model.graph.value_info[:]
    del model.graph.metadata_props[:]
    graph = model.graph
    entries: list[Any] = [*graph.node, *graph.input, *graph.output, *graph.initializer]
    for entry in entries:
        entry.ClearField("doc_string")
        del entry.metadata_props[:]


def _keep_spec(component: str, value: onnx.ValueInfoProto, spec: TensorSpec) -> None:
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    if dtype != np.dtype(spec.dtype):
        raise ExportError(f"{component}: {spec.name} is {dtype}, expected {spec.dtype}.")
    if len(tensor.shape.dim) != len(spec.shape):
        raise ExportError(f"{component}: {spec.name} has {len(tensor.shape.dim)} dimensions, expected {spec.shape}.")
    for dim, expected in zip(tensor.shape.dim, spec.shape, strict=True):
        if isinstance(expected, str):
            dim.dim_param = expected
        elif dim.HasField("dim_value") and dim.dim_value != expected:
            raise ExportError(f"{component}: {spec.name} has a dimension of {dim.dim_value}, expected {spec.shape}.")
        else:
            dim.dim_value = expected
