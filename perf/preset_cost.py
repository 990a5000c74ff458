"""Operations and bytes of a preset's networks, counted from their graphs: from artifacts, or from a preset alone.

Tracing the whole released transformer takes minutes. Its layers are alike, so the difference between graphs of one
and two layers gives the cost of a further layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Final

import onnx_ir as ir
from onnx import ModelProto

from live_avatar.config import Preset
from live_avatar.exporter.tracing import TracedGraph, Tracer
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.graphs.components import build_components
from live_avatar.graphs.contract import Contract, Extent, contracts, step_name
from live_avatar.model.networks import meta_networks
from live_avatar.weights.checkpoint import modulation_networks
from live_avatar.weights.tensors import Checkpoint, RandomWeights, shapes_of
from perf.roofline import Cost, count, load_graph

CONDITIONING: Final = ("speech_encoder", "audio_tokens")
DECODER: Final = "vae_decoder"


def stage_components(preset: Preset) -> dict[str, tuple[str, ...]]:
    """Components that each stage runs for every block."""
    steps = [step_name(step) for step in range(1, preset.stream.steps + 1)]
    return {"conditioning": CONDITIONING, **{step: (step,) for step in steps}, DECODER: (DECODER,)}


def artifacts_costs(artifacts: Artifacts) -> dict[str, Cost]:
    """Cost of every component of an artifacts folder."""
    return {
        name: count(load_graph(str(artifacts.graph_path(name))), _shapes(agreed))
        for name, agreed in artifacts.contracts.items()
    }


def preset_costs(preset: Preset) -> dict[str, Cost]:
    """Cost of every component that a stage of a preset runs for a block, and of the prefill, without weights."""
    others = _traced(preset, (*CONDITIONING, DECODER))
    step, prefill = (_deep(preset, name) for name in (step_name(1), "dit_prefill"))
    steps = {step_name(number): step for number in range(1, preset.stream.steps + 1)}
    return {**others, **steps, "dit_prefill": prefill}


def _deep(preset: Preset, component: str) -> Cost:
    """A component of the transformer, from one layer with audio injection, further layers, and the injection alone."""
    one, plain, injecting = (_with_layers(preset, *shape) for shape in ((1, (0,)), (2, (0,)), (2, (0, 1))))
    first, further, both = (_traced(small, [component])[component] for small in (one, plain, injecting))
    layers, injections = preset.dit.num_layers, len(preset.dit.audio_inject_layers)
    return Cost.combined(
        (1, first), (layers - 1, further), (1 - layers, first), (injections - 1, both), (1 - injections, further)
    )


def _with_layers(preset: Preset, layers: int, injecting: tuple[int, ...]) -> Preset:
    dit = dataclasses.replace(preset.dit, num_layers=layers, audio_inject_layers=injecting)
    return dataclasses.replace(preset, dit=dit)


def _traced(preset: Preset, names: Collection[str]) -> dict[str, Cost]:
    """Costs of components without weights; only the weights of a timestep's modulation are generated."""
    weights = RandomWeights(shapes_of(meta_networks(preset).dit), preset.weight_seed)
    networks = modulation_networks(Checkpoint(preset, {"dit": weights}))
    components = build_components(preset, networks)
    agreed = contracts(preset)
    tracer = Tracer({name: components[name] for name in names})
    return {name: count(_without_values(tracer.trace(agreed[name])), _shapes(agreed[name])) for name in names}


def _without_values(graph: TracedGraph) -> ModelProto:
    """The graph with its weights in an external file that does not exist."""
    for _, weight in graph.weights:
        assert weight.dtype is not None
        assert weight.shape is not None
        weight.const_value = ir.ExternalTensor("", 0, 0, weight.dtype, shape=weight.shape, name=str(weight.name))
    return ir.to_proto(graph.model)


def _shapes(agreed: Contract) -> Mapping[str, tuple[int, ...]]:
    return {spec.name: agreed.shape(spec, Extent.MAX) for spec in agreed.inputs}
