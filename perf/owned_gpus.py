"""What GPUs that people own could do with the released model, computed: `python -m perf.owned_gpus [--json FILE]`.

Memory is that of `live_avatar.graphs.memory`. Speed is that of the pipe's model (`perf.schedule`) on the bounds of
`perf.roofline`: rates of the maker's data sheets, which no kernel reaches, and half of them, which good kernels reach.
Nothing here was measured. FP8 counts for MatMul alone, and bytes of weights are those of bfloat16.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click

from live_avatar.config import S2V_14B, Preset
from live_avatar.serving.profiles import load_profile
from perf.figures import rounded
from perf.preset_cost import PREFILL, preset_costs, stage_components
from perf.roofline import Ceilings, Cost
from perf.scenarios.schedule import StageDurations, asked, sessions_by_memory

SHEET = "NVIDIA's data sheet of the {}, dense; not measured"
WHITEPAPER = "NVIDIA's whitepaper of {}, dense, sums in FP32; not measured"
RTX_PRO_6000 = Ceilings("RTX PRO 6000 Blackwell", 503.8e12, 1.792e12, SHEET.format("Workstation Edition"))
L40S = Ceilings("L40S", 362.05e12, 0.864e12, SHEET.format("L40S"))
RTX_5090 = Ceilings("RTX 5090", 209.5e12, 1.792e12, WHITEPAPER.format("RTX Blackwell"))
RTX_4090 = Ceilings("RTX 4090", 165.2e12, 1.008e12, WHITEPAPER.format("Ada"))
A100 = Ceilings("A100 80 GB", 312e12, 2.039e12, SHEET.format("A100 SXM"))
FULL, MIDDLE, SMALL = (704, 384), (512, 288), (256, 144)


@dataclass(frozen=True)
class Case:
    """GPUs of one kind under a profile; `memory_gib` is what the driver shows."""

    gpu: Ceilings
    memory_gib: float
    profile: str
    size: tuple[int, int] = FULL
    fp8: bool = True


CASES = (
    Case(RTX_PRO_6000, 95.6, "gpux1"),
    Case(RTX_PRO_6000, 95.6, "gpux2"),
    Case(RTX_PRO_6000, 95.6, "gpux5"),
    Case(L40S, 45.0, "gpux4"),
    Case(L40S, 45.0, "gpux5"),
    Case(RTX_5090, 31.8, "gpux5"),
    Case(RTX_5090, 31.8, "gpux5", MIDDLE),
    Case(RTX_4090, 24.0, "gpux5"),
    Case(RTX_4090, 24.0, "gpux5", SMALL),
    Case(A100, 79.6, "gpux5", fp8=False),
)


def measure(case: Case) -> dict[str, Any]:
    """Sessions that fit, with the text encoder's weights on the host, and speed at the bounds and at half of them."""
    preset = S2V_14B.with_precision("bfloat16").with_stream(width=case.size[0], height=case.size[1])
    profile = load_profile(case.profile)
    bound = _durations(case, preset)
    by_share = {share: asked(bound.slower(share), case.profile) for share in (1.0, 0.5)}
    fitting = sessions_by_memory(profile, case.memory_gib, preset)
    return {
        "gpu": case.gpu.name,
        "source": case.gpu.source,
        "memory_gib": case.memory_gib,
        "profile": case.profile,
        "gpus": len(profile.gpus),
        "picture": list(case.size),
        "precision": "FP8" if case.fp8 else "bfloat16",
        "sessions_by_memory": fitting[f"{'FP8' if case.fp8 else 'bfloat16'}, text encoder on the host"],
        "step_bound_s": bound.step_s,
        "fps": {f"{share:.0%}": found["steady_fps"] for share, found in by_share.items()},
        "real_time_sessions_by_time": {
            f"{share:.0%}": found["real_time_sessions_by_time"] for share, found in by_share.items()
        },
    }


def _durations(case: Case, preset: Preset) -> StageDurations:
    gpu = case.gpu
    if case.fp8:
        gpu = Ceilings(gpu.name, gpu.flops_per_s, gpu.bytes_per_s, gpu.source, {"MatMul": 2 * gpu.flops_per_s})
    costs = _costs(preset)
    parts = {**stage_components(preset), "prefill": PREFILL}
    bounds = {name: gpu.bound_s(Cost.combined(*((1, costs[use]) for use in uses))) for name, uses in parts.items()}
    return StageDurations(
        gpu.name, gpu.source, bounds["conditioning"], bounds["dit_step_1"], bounds["prefill"], bounds["vae_decoder"]
    )


@cache
def _costs(preset: Preset) -> Mapping[str, Cost]:
    return preset_costs(preset)


def table(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = ["GPUs", "memory", "profile", "picture", "type", "sessions that fit", "FPS at the bound", "at half of it"]
    rows = [head, ["---"] * len(head)]
    for case in found:
        fits = case["sessions_by_memory"]
        rates = [f"{case['fps'][share]:.0f}" if fits else "–" for share in ("100%", "50%")]
        size = "x".join(map(str, case["picture"]))
        name = f"{case['gpus']} {case['gpu']}"
        rows.append([name, f"{case['memory_gib']:g} GiB", case["profile"], size, case["precision"], str(fits), *rates])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


@click.command()
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the figures to this file.")
def main(json_path: Path | None) -> None:
    """Compute memory and speed of the released model on GPUs that people own; takes some minutes."""
    found = [rounded(measure(case)) for case in CASES]
    click.echo(table(found))
    if json_path:
        report = {"command": "python -m perf.owned_gpus", "computed": "not measured", "cases": found}
        json_path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
