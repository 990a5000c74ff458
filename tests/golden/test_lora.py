"""The adapter merged into the transformer's weights, and the velocity of what comes out (golden `lora`)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from live_avatar.model.dit import CausalDiT
from live_avatar.weights.lora import LoRA, MergedWeights
from live_avatar.weights.tensors import SafetensorsWeights
from tests.golden.conftest import COLUMNS, Golden
from tests.golden.trace import Geometry, Trace, audio_tokens, prefill, token_major
from tests.tolerances import PORT


@pytest.fixture(scope="module")
def base(golden_dir: Path) -> SafetensorsWeights:
    return SafetensorsWeights(golden_dir / "dit_weights.safetensors")


@pytest.fixture(scope="module")
def merged(base: SafetensorsWeights, golden_dir: Path) -> MergedWeights:
    return MergedWeights(base, LoRA(golden_dir / "lora.safetensors"))


@pytest.fixture(scope="module")
def merged_dit(dit: CausalDiT, merged: MergedWeights) -> CausalDiT:
    """A network of its own; the one without the adapter is shared by other tests."""
    model = copy.deepcopy(dit)
    model.load_state_dict({name: merged.read(name) for name in merged.shapes()})
    return model


def test_rank_and_alpha_are_the_stated_ones(
    base: SafetensorsWeights, merged: MergedWeights, golden_dir: Path, golden_config: dict[str, Any]
) -> None:
    stated = golden_config["lora"]
    assert merged.scale == stated["alpha"] / stated["rank"]
    given = LoRA(golden_dir / "lora.safetensors", alpha=2 * stated["alpha"])
    assert MergedWeights(base, given).scale == 2 * stated["alpha"] / stated["rank"]


def test_merged_weights(base: SafetensorsWeights, merged: MergedWeights, lora: Golden, lora_out: Golden) -> None:
    assert len(merged.merged) == len(lora.keys) // 2 == int(lora_out.metadata["merged_count"])
    golden = [key.removeprefix("merged_weight/") for key in lora_out.keys if key.startswith("merged_weight/")]
    assert golden
    for name in golden:
        lora_out.check(f"merged_weight/{name}", merged.read(name), PORT)
    for name in base.shapes():
        changed = not torch.equal(merged.read(name), base.read(name))
        assert changed == (name in merged.merged), name


def test_velocity_and_sink_with_the_adapter(
    merged_dit: CausalDiT, dit_step: Golden, lora_out: Golden, golden_config: dict[str, Any]
) -> None:
    geometry = Geometry.of(golden_config, merged_dit)
    text, sink = prefill(
        merged_dit, geometry, dit_step["in/context"], dit_step["in/ref_latents"], dit_step["in/motion_latents"]
    )
    lora_out.check("sink/cond_k/layer0", token_major(geometry.not_rotated(sink[0][0])), PORT)
    trace = Trace(merged_dit, geometry, float(dit_step["in/timestep"][0, 0]), text, sink)
    distance = int(lora_out.metadata["relative_dist"])
    for block in range(sum(key.startswith("velocity/") for key in lora_out.keys)):
        states = dit_step["in/audio"][0, :, :, COLUMNS * block : COLUMNS * (block + 1)]
        latent = dit_step[f"in/noise/block{block}"][None]
        velocity = trace.run(block, latent, audio_tokens(merged_dit, states), distance)
        lora_out.check(f"velocity/block{block}", velocity, PORT)
        shift = (lora_out[f"velocity/block{block}"] - dit_step[f"dist{distance}/velocity/block{block}"]).abs().max()
        assert shift > 100 * PORT, "the adapter is what is tested"


@pytest.mark.parametrize("infix", [".default", ""])
@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_every_style_of_key_gives_the_same_bits(
    base: SafetensorsWeights,
    merged: MergedWeights,
    lora: Golden,
    golden_config: dict[str, Any],
    tmp_path: Path,
    prefix: str,
    infix: str,
) -> None:
    stored = golden_config["lora"]["prefix"]
    renamed = {
        f"{prefix}{key.removeprefix(stored).replace('.default.', f'{infix}.')}": tensor
        for key, tensor in lora.all().items()
    }
    save_file(renamed, tmp_path / "lora.safetensors", metadata=lora.metadata)
    ours = MergedWeights(base, LoRA(tmp_path / "lora.safetensors"))
    assert ours.merged == merged.merged
    assert all(torch.equal(ours.read(name), merged.read(name)) for name in base.shapes())
