"""Time of the networks in torch on this machine's GPU, run in several ways, and the pipe that these times would give.

On a GPU it measures the released model's shape in bfloat16, without its weights; on a CPU the artifacts' preset, as a
functional test. The service uses TensorRT's engines on GPUs. These figures show how close good kernels come to the
device's peak, as a reference for the engines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from live_avatar.config import LATENT_CHANNELS, S2V_14B, Preset
from live_avatar.graphs.artifacts import load_artifacts
from live_avatar.graphs.components import build_components
from live_avatar.graphs.contract import DIT, SINK, Extent, contracts, decoder_state_shapes
from live_avatar.model.networks import Networks
from perf.kernels import (
    Timed,
    Work,
    attention,
    ceilings,
    channels_last,
    compiled,
    compiled_cuda_graph,
    cuda_graph,
    device,
    difference,
    eager,
    random_networks,
    random_tensors,
    timed,
    to_fp8,
)
from perf.preset_cost import CONDITIONING, DECODER, PREFILL, STEP, preset_costs, use_name
from perf.report import BLUE, axes, save
from perf.roofline import Ceilings, Cost
from perf.scenario import Context, Figures, Scenario, check
from perf.scenarios.schedule import StageDurations, asked

RUNS, QUICK_RUNS = 20, 3
BLOCK_USE, SINK_USE = DIT, use_name(DIT, SINK, first=False)
TRANSFORMER = (BLOCK_USE, SINK_USE)
REST = tuple(name for name in (*STEP, *PREFILL) if name not in TRANSFORMER)
PROFILES = {"cuda": ("gpux5", "gpux4"), "cpu": ("cpu",)}
SIZES = {"cuda": (8192, 2**32), "cpu": (1024, 2**28)}
"""Sides of the square products, and bytes copied, for the device's peak rates."""
TILE_HALO = 4
"""Margin, in latents, that a half of the picture takes from the other half."""
MOST_DIFFERENCE, MOST_FP8_DIFFERENCE = 0.02, 0.2
"""Largest relative RMS difference from eager torch: for sums in another order in 16 bits, and for FP8."""

Way = Callable[[nn.Module, Sequence[Tensor]], Work]
PLAIN: Mapping[str, Way] = {"eager": eager}
FURTHER: Mapping[str, Way] = {
    "compiled": compiled,
    "CUDA graph": cuda_graph,
    "compiled, CUDA graph": compiled_cuda_graph,
}
OF_DECODER: Mapping[str, Way] = {"channels last": channels_last}


@dataclass
class Bench:
    """One preset's networks on one device, and the device's peak rates."""

    preset: Preset
    on: torch.device
    ways: Mapping[str, Way]
    runs: int
    networks: Networks
    ceilings: Ceilings
    costs: Mapping[str, Cost]

    @classmethod
    def of(cls, preset: Preset, on: torch.device, quick: bool) -> Bench:
        runs = QUICK_RUNS if quick else RUNS
        return cls(
            preset,
            on,
            PLAIN if quick else {**PLAIN, **FURTHER},
            runs,
            random_networks(preset, on),
            ceilings(preset, on, runs, *SIZES[on.type]),
            preset_costs(preset),
        )

    def component(self, name: str, ways: Mapping[str, Way]) -> dict[str, Timed]:
        """One use of a component in several ways, with full caches."""
        component, _, profile = name.partition(", ")
        module = build_components(self.preset, self.networks)[component].to(self.on)
        inputs = random_tensors(contracts(self.preset)[component], self.on, Extent.MAX, profile or None)
        return {way: timed(lambda make=make: make(module, inputs), self.on, self.runs) for way, make in ways.items()}  # type: ignore[misc]

    def figures(self, name: str, found: Mapping[str, Timed], expected: Timed, fp8: bool = False) -> Figures:
        """For each way: seconds, the share of the bound, and the difference from eager torch's result."""
        roof = self.ceilings if fp8 else replace(self.ceilings, operators={})
        bound_s = roof.bound_s(self.costs[name])
        return {
            way: {"not_run": one.not_run}
            if one.seconds is None
            else {
                "seconds": one.seconds,
                "share_of_bound": bound_s / one.seconds,
                "difference": difference(one.outputs, expected.outputs),
            }
            for way, one in found.items()
        }


def measure(context: Context) -> Figures:
    on = device()
    preset = S2V_14B.with_precision("bfloat16") if on.type == "cuda" else load_artifacts(context.artifacts).preset
    bench = Bench.of(preset, on, context.quick)
    components = _components(bench)
    given = StageDurations(
        bench.ceilings.name,
        "the fastest way of each component, measured in torch",
        conditioning_s=sum(fastest(components[name]) for name in CONDITIONING),
        step_s=sum(fastest(components[name]) for name in STEP),
        prefill_s=sum(fastest(components[name]) for name in PREFILL),
        decoder_s=preset.stream.frames_per_block * fastest(components[DECODER]),
    )
    _picture(context, preset, components)
    return {
        "device": bench.ceilings.name,
        "preset": preset.name,
        "precision": preset.precision,
        "ceilings": {
            "flops_per_s": bench.ceilings.flops_per_s,
            "fp8_flops_per_s": bench.ceilings.operators.get("MatMul"),
            "bytes_per_s": bench.ceilings.bytes_per_s,
            "source": bench.ceilings.source,
        },
        "components": components,
        "attention_of_a_step": _attention(bench),
        "half_a_picture": _half(bench),
        "decoder_by_step": given.decoder_s / given.step_s,
        "pipe": {profile: asked(given, profile) for profile in PROFILES[on.type]},
        "checks": list(_checks(components)),
    }


def _components(bench: Bench) -> dict[str, Figures]:
    """Every way of every component. FP8 comes last, because it replaces the transformer's weights."""
    found = {name: bench.component(name, bench.ways) for name in (*CONDITIONING, *REST, *TRANSFORMER)}
    found[DECODER] = bench.component(DECODER, {**bench.ways, **OF_DECODER})
    figures = {name: bench.figures(name, ways, ways["eager"]) for name, ways in found.items()}
    to_fp8(bench.networks.dit)
    for name in TRANSFORMER:
        fp8 = {f"FP8, {way}": one for way, one in bench.component(name, bench.ways).items()}
        figures[name] |= bench.figures(name, fp8, found[name]["eager"], fp8=True)
    return figures


def fastest(ways: Figures) -> float:
    return min(float(way["seconds"]) for way in ways.values() if "seconds" in way)


def _attention(bench: Bench) -> Figures:
    """Time of one layer's self-attention over history, block and sink, by kernel."""
    dit, stream = bench.preset.dit, bench.preset.stream
    agreed = contracts(bench.preset)[DIT]
    widths = {spec.name: agreed.shape(spec, Extent.MAX)[-2] for spec in agreed.inputs if spec.name.endswith("_k.0")}
    queries = stream.frames_per_block * stream.frame_tokens
    keys = queries + sum(tokens for name, tokens in widths.items() if not name.startswith("text"))
    kind = getattr(torch, bench.preset.precision)
    found = attention(dit.num_heads, queries, keys, dit.head_dim, kind, bench.on, bench.runs)
    flops = 4 * dit.num_heads * queries * keys * dit.head_dim
    kernels = {
        name: {"not_run": one.not_run}
        if one.seconds is None
        else {"seconds": one.seconds, "share_of_ceiling": flops / one.seconds / bench.ceilings.flops_per_s}
        for name, one in found.items()
    }
    return {"queries": queries, "keys": keys, "layers": dit.num_layers, "kernels": kernels}


def _half(bench: Bench) -> Figures:
    """Time of the decoder on half of the picture's width with a margin, as for two GPUs that share it.

    The margin that hides the seam depends on the weights and is not measured. The weights are channels-last here.
    """
    preset, stream = bench.preset, bench.preset.stream
    width = min(stream.latent_width, -(-stream.latent_width // 2) + TILE_HALO)
    shapes = decoder_state_shapes(preset.tae or preset.vae, stream.latent_height, width)
    latents = (1, LATENT_CHANNELS, stream.frames_per_block, stream.latent_height, width)
    kinds = [getattr(torch, spec.dtype) for spec in contracts(preset)[DECODER].inputs]
    inputs = [
        torch.randn(shape, device=bench.on).to(kind) for shape, kind in zip((latents, *shapes), kinds, strict=True)
    ]
    module = build_components(preset, bench.networks)[DECODER].to(bench.on)
    one = timed(lambda: eager(module, inputs), bench.on, bench.runs)
    return {"latents_wide": width, "of": stream.latent_width, "seconds": one.seconds, "not_run": one.not_run or None}


def _checks(components: Mapping[str, Figures]) -> list[Figures]:
    """Checks that every way that ran gave eager torch's result."""
    return [
        check(
            f"difference of {name}, {way}",
            one["difference"],
            at_most=MOST_FP8_DIFFERENCE if "FP8" in way else MOST_DIFFERENCE,
        )
        for name, ways in components.items()
        for way, one in ways.items()
        if way != "eager" and "difference" in one
    ]


def _picture(context: Context, preset: Preset, components: Mapping[str, Figures]) -> None:
    shown = {
        f"{name}, {way}": 1e3 * one["seconds"]
        for name, ways in components.items()
        for way, one in ways.items()
        if "seconds" in one
    }
    plot = axes(f"{preset.name} in torch, by component and way", "milliseconds", "", height=0.6 + 0.22 * len(shown))
    plot.barh(list(shown)[::-1], list(shown.values())[::-1], color=BLUE)
    plot.set_xscale("log")
    save(plot, context.picture("kernels"))


SCENARIO = Scenario(
    "kernels", "the networks in torch on this machine's GPU, in every way of running them", measure, ("torch",)
)
