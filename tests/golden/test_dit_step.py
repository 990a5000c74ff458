"""One timestep, one ring, one sink, over several blocks (golden `dit_step` and `dit_debug`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from live_avatar.model.dit import CausalDiT
from tests.golden.conftest import COLUMNS, Golden
from tests.golden.trace import Geometry, Trace, audio_tokens, prefill, token_major
from tests.tolerances import PORT


def blocks_of(golden: Golden, prefix: str) -> int:
    return sum(key.startswith(f"{prefix}/velocity/block") for key in golden.keys)


@pytest.mark.parametrize("distance", [30, 10])
def test_velocity_and_ring_of_every_block(
    dit: CausalDiT, dit_step: Golden, golden_config: dict[str, Any], distance: int
) -> None:
    geometry = Geometry.of(golden_config, dit)
    text, sink = prefill(
        dit, geometry, dit_step["in/context"], dit_step["in/ref_latents"], dit_step["in/motion_latents"]
    )
    for layer, (key, value) in enumerate(sink):
        dit_step.check(f"sink/cond_k/layer{layer}", token_major(geometry.not_rotated(key)), PORT)
        dit_step.check(f"sink/cond_v/layer{layer}", token_major(value), PORT)

    trace = Trace(dit, geometry, float(dit_step["in/timestep"][0, 0]), text, sink)
    prefix = f"dist{distance}"
    ends = {"first": 0, "last": dit.config.num_layers - 1}
    for block in range(blocks_of(dit_step, prefix)):
        states = dit_step["in/audio"][0, :, :, COLUMNS * block : COLUMNS * (block + 1)]
        latent = dit_step[f"in/noise/block{block}"][None]
        velocity = trace.run(block, latent, audio_tokens(dit, states), distance)
        dit_step.check(f"{prefix}/velocity/block{block}", velocity, PORT)
        for end, layer in ends.items():
            written = trace.slots[block % geometry.window]
            assert written is not None
            for name, tensor in zip("kv", written[layer], strict=True):
                key = f"{prefix}/ring_{name}_written/{end}/block{block}"
                if key in dit_step.keys:
                    dit_step.check(key, token_major(tensor), PORT)
    for end, layer in ends.items():
        for part, name in enumerate("kv"):
            key = f"{prefix}/ring_{name}_final/{end}"
            if key in dit_step.keys:
                ring = torch.cat([slot[layer][part] for slot in trace.slots if slot is not None], dim=2)
                dit_step.check(key, token_major(ring), PORT)


def test_embeddings_and_phases(
    dit: CausalDiT, dit_step: Golden, dit_debug: Golden, golden_config: dict[str, Any]
) -> None:
    geometry = Geometry.of(golden_config, dit)
    for block in (0, 5):
        phase, sink = geometry.block_phase(block), geometry.sink_phase(max(30, geometry.frames * block + 30))
        for part, name in enumerate(("cos", "sin")):
            dit_debug.check(f"block{block}/rope_{name}_self", phase[part], PORT)
            dit_debug.check(f"block{block}/rope_{name}_cond", sink[part], PORT)
    for part, name in enumerate(("cos", "sin")):
        dit_debug.check(f"sink/rope_{name}_self", geometry.sink_phase(30)[part], PORT)
    dit_debug.check("block0/tokens_in", dit.noisy_tokens(dit_step["in/noise/block0"][None], None), PORT)
    dit_debug.check("sink/tokens_in", dit.sink_tokens(dit_step["in/ref_latents"], dit_step["in/motion_latents"]), PORT)
