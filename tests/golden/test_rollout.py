"""Four-step rollouts with the sink replaced never, before block 4, and right after block 0 (golden `rollout`)."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from live_avatar.config import TINY
from live_avatar.model.dit import CausalDiT
from live_avatar.model.schedule import make_schedule
from tests.golden.conftest import Golden
from tests.golden.trace import Geometry, Trace, audio_tokens, prefill, token_major
from tests.tolerances import PORT, ROLLOUT


def test_schedule(rollout: Golden) -> None:
    schedule = make_schedule(TINY.stream)
    rollout.check("scheduler/timesteps", torch.tensor(schedule.timesteps), PORT)
    rollout.check("scheduler/sigmas", torch.tensor(schedule.sigmas), 1e-7)


@pytest.mark.parametrize("variant", ["none", "tpp", "alg3", "tpp_randdist"])
def test_rollout(dit: CausalDiT, rollout: Golden, golden_config: dict[str, Any], variant: str) -> None:
    geometry = Geometry.of(golden_config, dit)
    schedule = make_schedule(TINY.stream)
    replaced_before = json.loads(rollout.metadata["sink_replaced_before_block"])[variant]
    motion = rollout["in/motion_latents"]
    text, sink = prefill(dit, geometry, rollout["in/context"], rollout["in/ref_latents"], motion)
    traces = [Trace(dit, geometry, t, text, sink) for t in schedule.timesteps]
    first_clean = None
    checked = 0
    for block in range(golden_config["run"]["rollout_blocks"]):
        if block == replaced_before:
            _, sink = prefill(dit, geometry, rollout["in/context"], first_clean, motion)
            for trace in traces:
                trace.sink = sink
            if f"{variant}/sink_after_update/cond_k/layer0" in rollout.keys:
                last = dit.config.num_layers - 1
                rollout.check(
                    f"{variant}/sink_after_update/cond_k/layer0", token_major(geometry.not_rotated(sink[0][0])), ROLLOUT
                )
                rollout.check(f"{variant}/sink_after_update/cond_v/layer{last}", token_major(sink[last][1]), ROLLOUT)
        latent = rollout[f"in/noise/block{block}"][None]
        audio = audio_tokens(dit, rollout["in/audio"][0, :, :, 12 * block : 12 * (block + 1)])
        for step, trace in enumerate(traces):
            distance = int(rollout["in/random_relative_dist"][block, step]) if variant == "tpp_randdist" else 30
            velocity = trace.run(block, latent, audio, distance)
            latent = torch.from_numpy(schedule.euler(step, latent.numpy(), velocity.numpy()))
            for key, ours in (
                (f"{variant}/velocity/block{block}/step{step}", velocity),
                (f"{variant}/latent/block{block}/after_step{step}", latent),
            ):
                if key in rollout.keys:
                    rollout.check(key, ours, ROLLOUT)
                    checked += 1
        if f"{variant}/latent/block{block}/final" in rollout.keys:
            rollout.check(f"{variant}/latent/block{block}/final", latent, ROLLOUT)
            checked += 1
        if block == 0:
            first_clean = latent[:, :, :1]
    assert checked >= 4, "the golden file has tensors for this variant"
