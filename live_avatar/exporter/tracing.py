"""One torch component becomes one ONNX graph that keeps its contract, without its weights in memory.

Components are traced with fake tensors. In the graph that comes out every weight is an initializer without a value,
under its name in the state dict; `build.py` puts the values into a file.
"""

from __future__ import annotations

import gc
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.pattern import RewriteRule
from onnxscript.rewriter.rules.common import materialize_reshape_shape_rule
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from live_avatar.arrays import Array
from live_avatar.errors import ExportError
from live_avatar.graphs.contract import Contract, Extent, GraphTensor
from live_avatar.model.networks import replace_parameters
from live_avatar.runtime.host import numpy_dtype


def _cast(op: Any, numbers: ir.Value) -> ir.Value:
    return op.Cast(numbers, _outputs=["wide"])


def _is_from_fp8(context: Any, numbers: ir.Value, **_: ir.Value) -> bool:
    return numbers.dtype == ir.DataType.FLOAT8E4M3FN


def _dequantized(op: Any, numbers: ir.Value, wide: ir.Value) -> ir.Value:
    assert wide.dtype is not None
    return op.DequantizeLinear(numbers, op.Constant(value=ir.tensor(1.0, wide.dtype)))


CASTS_FROM_FP8 = RewriteRule(_cast, _dequantized, _is_from_fp8)
"""A cast from FP8 becomes DequantizeLinear with scale 1: the same numbers, and TensorRT refuses the cast."""
CLEAN_UP = ir.passes.Sequential(
    RewritePass([materialize_reshape_shape_rule, CASTS_FROM_FP8]),
    passes.RemoveUnusedNodesPass(),
    passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
    passes.RemoveUnusedOpsetsPass(),
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    passes.DeduplicateInitializersPass(),
    passes.CommonSubexpressionEliminationPass(),
    passes.OutputFixPass(),
    passes.NameFixPass(),
)
"""After functions are inlined and constants folded: what onnxscript's `optimize_ir` does, but with one of its rewrite
rules, without which shapes cannot be inferred. The others took half of the time of an export, and ONNX Runtime and
TensorRT have their own."""
NEW_OBJECTS = 100_000
"""Of Python, between two collections while a component is traced (700 by default). Memory's peak grows by a tenth."""
OPSET = 23  # Attention and RMSNormalization as operators; read by TensorRT 10.15 and later


def random_inputs(
    contract: Contract, seed: int, extent: Extent = Extent.OPT, profile: str | None = None
) -> dict[str, Array]:
    """Fresh inputs of a contract; symbolic dimensions have that extent in the first profile or the one named."""
    generator = np.random.default_rng(seed)
    return {spec.name: _random(spec, contract.shape(spec, extent, profile), generator) for spec in contract.inputs}


def _random(spec: GraphTensor, shape: tuple[int, ...], generator: np.random.Generator) -> Array:
    if spec.dtype == "int64":
        return generator.integers(0, 2, shape, dtype=np.int64)
    return generator.standard_normal(shape, dtype=np.float32).astype(numpy_dtype(spec.dtype))


@dataclass(frozen=True)
class TracedGraph:
    """A graph whose weights have no values yet.

    weights: initializers with the names of the component's parameters and buffers, a tied one under its first name;
    constants: the values of the buffers, such as a timestep's modulation.
    """

    model: ir.Model
    weights: Sequence[tuple[str, ir.Value]]
    constants: Mapping[str, Tensor]


class Tracer:
    """Exports components that share networks. Takes their parameters away: afterwards they can only be traced."""

    def __init__(self, components: Mapping[str, nn.Module]) -> None:
        self._components = components
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._constants = {name: dict(module.named_buffers()) for name, module in components.items()}
        with self._mode:
            replace_parameters(nn.ModuleList(components.values()), lambda _, p: torch.empty(p.shape, dtype=p.dtype))
            for module in nn.ModuleList(components.values()).modules():
                for name, buffer in module._buffers.items():
                    module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)

    def trace(self, contract: Contract) -> TracedGraph:
        """The component's graph at `OPSET`. Raises `ExportError` if it does not keep the contract."""
        component = self._components[contract.name]
        with self._mode, _quiet(), _rare_collections(), torch.no_grad():
            program = torch.onnx.export(
                component,
                tuple(_fake(spec, contract) for spec in contract.inputs),
                dynamo=True,
                opset_version=OPSET,
                input_names=[spec.name for spec in contract.inputs],
                output_names=[spec.name for spec in contract.outputs],
                dynamic_shapes=_dynamic_shapes(component, contract),
                verbose=False,
                optimize=False,  # it would fold weights, which have no values here
            )
        if program is None:
            raise ExportError(f"{contract.name}: torch.onnx.export gave no program; expected one at opset {OPSET}.")
        constants = self._constants[contract.name]
        names = {**_first_names(component), **{name: name for name in constants}}
        _optimise(program.model, names.keys())
        _keep_contract(program.model, contract)
        initializers = program.model.graph.initializers.items()
        weights = [(names[name], value) for name, value in initializers if name in names]
        return TracedGraph(program.model, weights, constants)


def _first_names(component: nn.Module) -> dict[str, str]:
    """For every name of a parameter the first name of that parameter."""
    first = {id(parameter): name for name, parameter in component.named_parameters()}
    return {name: first[id(parameter)] for name, parameter in component.named_parameters(remove_duplicate=False)}


def _fake(spec: GraphTensor, contract: Contract) -> Tensor:
    return torch.empty(contract.shape(spec, Extent.OPT), dtype=getattr(torch, spec.dtype))


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Python's garbage collector leaves alone what is there, and runs rarely. It would walk all objects of torch again
    and again while a graph grows, which took an eighth of an export."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(NEW_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter reports of itself (that torchvision is absent, deprecations in torch's own code)."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _optimise(model: ir.Model, weights: Set[str]) -> None:
    """Simplifies the graph around its weights, which stay as they are."""
    for name in weights & model.graph.initializers.keys():
        model.graph.initializers[name].const_value = None
    with _quiet():
        passes.InlinePass()(model)
        fold_constants_ir(model)
        CLEAN_UP(model)
    _strip(model)


def _strip(model: ir.Model) -> None:
    """Drops what the exporter leaves for debugging: stack traces with paths, and the types of inner values."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.doc_string = None
        node.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.doc_string = None
        value.metadata_props.clear()


def _dynamic_shapes(component: nn.Module, contract: Contract) -> dict[str, object] | None:
    """Torch's notation of the contract's symbolic dimensions, by the names of `forward`'s arguments."""
    if not contract.profiles:
        return None
    marks = iter(
        [{i: torch.export.Dim.DYNAMIC for i, d in enumerate(s.shape) if isinstance(d, str)} for s in contract.inputs]
    )
    parameters = inspect.signature(component.forward).parameters.values()
    return {p.name: tuple(marks) if p.kind == p.VAR_POSITIONAL else next(marks) for p in parameters}


def _keep_contract(model: ir.Model, contract: Contract) -> None:
    """Checks opset, names, types and fixed sizes, and gives symbolic dimensions the contract's names."""
    if dict(model.opset_imports) != {"": OPSET}:
        raise ExportError(
            f"{contract.name}: exported with opsets {dict(model.opset_imports)}, expected only the standard one at "
            f"{OPSET}."
        )
    for side, values, specs in (
        ("input", model.graph.inputs, contract.inputs),
        ("output", model.graph.outputs, contract.outputs),
    ):
        if [value.name for value in values] != [spec.name for spec in specs]:
            raise ExportError(
                f"{contract.name}: {side}s are {[v.name for v in values]}, expected {[s.name for s in specs]}."
            )
        for value, spec in zip(values, specs, strict=True):
            _keep_spec(contract.name, value, spec)


def _keep_spec(component: str, value: ir.Value, spec: GraphTensor) -> None:
    dtype = value.dtype.numpy() if value.dtype is not None else None
    if dtype != numpy_dtype(spec.dtype):
        raise ExportError(f"{component}: {spec.name} is {dtype}, expected {spec.dtype}.")
    dims: list[Any] = list(value.shape or ())
    kept = len(dims) == len(spec.shape) and all(
        not isinstance(dim, int) if isinstance(expected, str) else dim == expected or not isinstance(dim, int)
        for dim, expected in zip(dims, spec.shape, strict=True)
    )
    if not kept:
        raise ExportError(f"{component}: {spec.name} has shape {dims}, expected {spec.shape}.")
    value.shape = ir.Shape(spec.shape)
