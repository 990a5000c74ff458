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
from live_avatar.graphs.contract import BLOCK_TOKENS, DIT, SINK, SINK_TOKENS, TEXT, Contract, Extent, contracts
from live_avatar.model.networks import meta_networks
from live_avatar.pipeline.denoiser import all_steps, one_step
from live_avatar.serving.steps import stage_name
from perf.roofline import Cost, count, load_graph

CONDITIONING: Final = ("speech_encoder", "audio_tokens")
DECODER: Final = "vae_decoder"


def use_name(component: str, profile: str | None, first: bool = True) -> str:
    """Name of a component's run in a profile: that of the component alone in its first profile."""
    return component if first else f"{component}, {profile}"


STEP: Final = (BLOCK_TOKENS, DIT)
PREFILL: Final = (TEXT, SINK_TOKENS, use_name(DIT, SINK, first=False))
"""What a denoising step runs for a block, and a stage for a sink."""


def uses(agreed: Contract) -> dict[str, str | None]:
    """Profiles of a component by `use_name`; None for a component without profiles."""
    return {use_name(agreed.name, profile, not n): profile for n, profile in enumerate(agreed.profiles or (None,))}


def stage_components(preset: Preset) -> dict[str, tuple[str, ...]]:
    """Uses of components, by stage, for every block: one stage for each step. The decoder runs once for each latent."""
    steps = [stage_name(one_step(step)) for step in all_steps(preset.stream.steps)]
    decodings = (DECODER,) * preset.stream.frames_per_block
    return {"conditioning": CONDITIONING, **dict.fromkeys(steps, STEP), DECODER: decodings}


def artifacts_costs(artifacts: Artifacts) -> dict[str, Cost]:
    """Cost of every use of the components of an artifacts folder."""
    return {
        use: count(load_graph(str(artifacts.graph_path(name))), _shapes(agreed, profile))
        for name, agreed in artifacts.contracts.items()
        for use, profile in uses(agreed).items()
    }


def preset_costs(preset: Preset) -> dict[str, Cost]:
    """Cost of every use that a stage of a preset runs for a block or a sink, without weights."""
    return {**_traced(preset, (*CONDITIONING, DECODER, BLOCK_TOKENS, SINK_TOKENS)), **_deep(preset, (TEXT, DIT))}


def _deep(preset: Preset, components: Collection[str]) -> dict[str, Cost]:
    """Components of all layers, from one layer with audio injection, further layers, and the injection alone."""
    shapes = ((1, (0,)), (2, (0,)), (2, (0, 1)))
    first, further, both = (_traced(_with_layers(preset, *shape), components) for shape in shapes)
    layers, injections = preset.dit.num_layers, len(preset.dit.audio_inject_layers)
    return {
        use: Cost.combined(
            (1, first[use]),
            (layers - 1, further[use]),
            (1 - layers, first[use]),
            (injections - 1, both[use]),
            (1 - injections, further[use]),
        )
        for use in first
    }


def _with_layers(preset: Preset, layers: int, injecting: tuple[int, ...]) -> Preset:
    dit = dataclasses.replace(preset.dit, num_layers=layers, audio_inject_layers=injecting)
    return dataclasses.replace(preset, dit=dit)


def _traced(preset: Preset, names: Collection[str]) -> dict[str, Cost]:
    """Costs of the uses of components, without weights."""
    components = build_components(preset, meta_networks(preset))
    agreed = contracts(preset)
    tracer = Tracer({name: components[name] for name in names})
    costs: dict[str, Cost] = {}
    for name in names:
        graph = _without_values(tracer.trace(agreed[name]))
        costs |= {use: count(graph, _shapes(agreed[name], profile)) for use, profile in uses(agreed[name]).items()}
    return costs


def _without_values(graph: TracedGraph) -> ModelProto:
    """The graph with its weights in an external file that does not exist."""
    for _, weight in graph.weights:
        assert weight.dtype is not None
        assert weight.shape is not None
        weight.const_value = ir.ExternalTensor("", 0, 0, weight.dtype, shape=weight.shape, name=str(weight.name))
    return ir.to_proto(graph.model)


def _shapes(agreed: Contract, profile: str | None) -> Mapping[str, tuple[int, ...]]:
    return {spec.name: agreed.shape(spec, Extent.MAX, profile) for spec in agreed.inputs}
