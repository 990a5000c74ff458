"""Idle sessions parked in the memory of the host, computed: `python -m perf.parking`.

A session that sends nothing holds its caches on every GPU. Moved to the host and back, they leave room for another
session, and cost the next block the way back: each GPU moves its own part at the same time, so the fullest one decides.
Bytes are those of `live_avatar.graphs.memory`; the rate is that of NVIDIA's data sheet for one direction, which no copy
reaches, and half of it. Nothing here was measured, and no stage parks sessions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import click

from live_avatar.config import S2V_14B, Preset
from live_avatar.graphs.contract import contracts
from live_avatar.graphs.memory import GIB, session_memory
from live_avatar.serving.profiles import Profile, load_profile
from perf.scenarios.schedule import sessions_by_memory

PCIE_BYTES_PER_S = 64e9
"""PCIe 5.0 x16 in one direction (data sheets of H100 and H800: 128 GB/s in both)."""
GPU_MEMORY_GIB = 79.6
"""What the driver shows of 80 GB."""


@dataclass(frozen=True)
class Parked:
    """One parked session. gpu_bytes: of the GPU that holds most of it; back_s: until it is back, at the full rate."""

    gpu_bytes: int
    host_bytes: int
    sessions_on_the_gpus: int

    @property
    def back_s(self) -> float:
        return self.gpu_bytes / PCIE_BYTES_PER_S


def parked(profile: Profile, preset: Preset, fp8: bool) -> Parked:
    """What parking a session of the preset means for a profile; `fp8` are the transformer's weights."""
    held = session_bytes(profile, preset)
    fitting = sessions_by_memory(profile, GPU_MEMORY_GIB, preset)["FP8" if fp8 else "bfloat16"]
    return Parked(max(held.values()), sum(held.values()), fitting)


def session_bytes(profile: Profile, preset: Preset) -> Mapping[int, int]:
    """Bytes of one session on every GPU of a profile."""
    agreed = contracts(preset)
    held: dict[int, int] = defaultdict(int)
    for place in profile.chain:
        if place.gpu is not None:
            held[place.gpu] += sum(session_memory(preset, place.memory_stage, agreed).per_session.values())
    return held


@click.command()
def main() -> None:
    """Print a row for each profile and type of the caches."""
    base = S2V_14B.with_precision("bfloat16")
    click.echo("profile   KV cache  fullest GPU  host     back at the rate, at half of it  sessions on the GPUs")
    for name in ("gpux1", "gpux5"):
        for dtype in (None, "fp8"):
            one = parked(load_profile(name), base.with_kv_cache_dtype(dtype), fp8=True)
            click.echo(
                f"{name:9} {dtype or 'bfloat16':9} {one.gpu_bytes / GIB:5.1f} GiB    {one.host_bytes / GIB:5.1f} GiB"
                f"{one.back_s:8.2f} s, {2 * one.back_s:.2f} s {one.sessions_on_the_gpus:20}"
            )


if __name__ == "__main__":
    main()
