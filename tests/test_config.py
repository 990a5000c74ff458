"""Sizes that fit together, sentences for those that do not, and the released model's exact parameters."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch

from live_avatar.config import PRESETS, S2V_14B, TINY, DiTConfig, Preset, StreamConfig, preset
from live_avatar.errors import ConfigError
from live_avatar.model.dit import CausalDiT
from live_avatar.model.vae import VAE
from tests.support.released import released_parameters


@pytest.mark.parametrize(
    ("network", "make", "tensors", "parameters"),
    [
        ("dit", lambda: CausalDiT(S2V_14B.dit), 1260, 16_295_755_609),
        ("vae", lambda: VAE(S2V_14B.vae), 194, 126_892_531),
    ],
)
def test_the_14b_networks_have_exactly_the_released_parameters(
    network: str, make: Callable[[], torch.nn.Module], tensors: int, parameters: int
) -> None:
    with torch.device("meta"):
        state = make().state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == released_parameters(network)
    assert len(state) == tensors
    assert sum(tensor.numel() for tensor in state.values()) == parameters


def test_sizes_of_the_14b_stream() -> None:
    stream = S2V_14B.stream
    assert (stream.latent_height, stream.latent_width) == (88, 48)
    assert stream.frame_tokens == 1056
    assert stream.block_tokens == 3 * 1056
    assert stream.window_blocks * stream.block_tokens == 12_672
    assert stream.past_blocks == 3
    assert stream.sink_tokens == 2640
    assert (stream.block_frames, stream.block_samples) == (12, 7680)
    assert stream.latent_shape == (16, 3, 88, 48)
    assert S2V_14B.dit.head_dim == 128


def test_incomplete_packing_kernels_give_no_sink_tokens() -> None:
    stream = StreamConfig(height=80, width=144)  # latents 10 x 18
    assert stream.frame_tokens == 5 * 9
    assert stream.sink_tokens == 2 * 45 + 2 * 4 + 4 * 1 * 2


@pytest.mark.parametrize(("samples", "features"), [(7680, 23), (30_720, 95), (400, 1), (719, 1), (720, 2)])
def test_the_speech_encoder_gives_50_features_a_second(samples: int, features: int) -> None:
    assert TINY.speech.feature_count(samples) == features


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_survives_json(name: str) -> None:
    made = preset(name)
    assert Preset.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_a_changed_preset_survives_json() -> None:
    sigmas = (1.0, 0.857692301273346, 1 / 3, 0.0)
    changed = replace(TINY, weight_seed=1).with_stream(sink_update_block=None, lookahead_ms=120, steps=3, sigmas=sigmas)
    again = Preset.from_dict(json.loads(json.dumps(changed.to_dict())))
    assert again == changed != TINY
    assert again.stream.sigmas == sigmas
    assert isinstance(hash(again), int), "a list would have no hash"


def test_a_preset_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        TINY.stream.height = 128  # type: ignore[misc]


def test_with_stream_changes_the_stream_alone_and_checks_it() -> None:
    changed = TINY.with_stream(steps=2)
    assert changed.stream.steps == 2
    assert changed.with_stream(steps=TINY.stream.steps) == TINY
    with pytest.raises(ConfigError, match="steps is 0"):
        TINY.with_stream(steps=0)


def test_past_keys_and_values_have_the_precision_or_a_type_of_their_own() -> None:
    low = TINY.with_precision("bfloat16")
    assert low.history_dtype == "bfloat16"
    changed = low.with_kv_cache_dtype("fp8")
    assert (changed.precision, changed.history_dtype) == ("bfloat16", "float8_e4m3fn")
    assert changed.with_kv_cache_dtype(None) == low
    assert Preset.from_dict(json.loads(json.dumps(changed.to_dict()))) == changed
    older = {name: value for name, value in TINY.to_dict().items() if name != "kv_cache_dtype"}
    assert Preset.from_dict(older) == TINY
    with pytest.raises(ConfigError, match=r"kv_cache_dtype 'fp4' is unknown; choose one of fp8, or leave it out\."):
        TINY.with_kv_cache_dtype("fp4")


DIT_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"num_heads": 3}, r"dim 128 is not a multiple of 3 heads; change one\."),
    ({"dim": 12, "num_heads": 4}, r"head width 3 is odd, but RoPE turns pairs; make dim/heads even\."),
    ({"dim": 6, "num_heads": 3}, r"dim 6 is not a multiple of 4, which the audio encoder needs\."),
    ({"freq_dim": 255}, r"freq_dim 255 is odd; it holds cosines and sines in equal number\."),
    (
        {"audio_inject_layers": (0, 6)},
        r"audio_inject_layers \(0, 6\) must be ascending numbers below 6 layers\.",
    ),
    ({"audio_inject_layers": (2, 0)}, r"audio_inject_layers \(2, 0\) must be ascending numbers"),
    ({"audio_inject_layers": (1, 1)}, r"audio_inject_layers \(1, 1\) must be ascending numbers"),
]

STREAM_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"height": 100}, r"height 100 is not a positive multiple of 16 pixels; a token covers 16x16\."),
    ({"width": -16}, r"width -16 is not a positive multiple of 16 pixels; a token covers 16x16\."),
    ({"width": 48}, r"picture 48x96 is below 64 pixels a side, the packer's largest kernel\."),
    ({"steps": 0}, r"steps is 0; at least one denoising step is needed\."),
    ({"schedule_shift": 0.0}, r"schedule_shift is 0\.0; it must be above 0\."),
    (
        {"sigmas": (1.0, 0.5, 0.0)},
        r"sigmas \(1\.0, 0\.5, 0\.0\) are of 2 steps, but steps is 4; give one value more than there are steps\.",
    ),
    ({"frames_per_block": 0}, r"frames_per_block is 0; at least 1 latent frame is needed\."),
    ({"window_blocks": 1}, r"window_blocks is 1; 2 is the least \(one past block\)\."),
    ({"sink_distance": 3}, r"sink_distance 3 is outside 4\.\.30, the range of training"),
    ({"sink_distance": 31}, r"sink_distance 31 is outside 4\.\.30, the range of training"),
    (
        {"sink_update_block": 1},
        r"sink_update_block 1 must be None or at least 2: the sink comes from block 1\.",
    ),
    (
        {"lookahead_ms": 60},
        r"lookahead_ms 60 must be a multiple of one frame, 40 ms, and at most 1440 with a window of 4 blocks\.",
    ),
    ({"lookahead_ms": 1480}, r"lookahead_ms 1480 must be a multiple of one frame, 40 ms, and at most 1440"),
    ({"lookahead_ms": -40}, r"lookahead_ms -40 must be a multiple of one frame, 40 ms, and at most 1440"),
    ({"decoder_warmup_latents": 20}, r"decoder_warmup_latents 20 must be 1 to 19\."),
    ({"decoder_warmup_latents": 0}, r"decoder_warmup_latents 0 must be 1 to 19\."),
    ({"speech_window_blocks": 0}, r"speech_window_blocks is 0; at least 1 is needed\."),
]


NOT_FALLING = [
    (),
    (0.0,),
    (1.0,),
    (1.0, 0.5),
    (0.5, 0.7, 0.0),
    (0.5, 0.5, 0.0),
    (1.1, 0.0),
    (1.0, 0.0, -0.1),
    (float("nan"), 0.0),
    (float("inf"), 0.0),
]


@pytest.mark.parametrize("sigmas", NOT_FALLING)
def test_sigmas_that_do_not_fall_to_zero_are_refused(sigmas: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"sigmas \(.*\) must fall from at most 1 to exactly 0; give at least two\."):
        replace(TINY.stream, steps=len(sigmas) - 1, sigmas=sigmas)


@pytest.mark.parametrize(("changes", "message"), DIT_ERRORS)
def test_a_dit_that_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(TINY.dit, **changes)


@pytest.mark.parametrize(("changes", "message"), STREAM_ERRORS)
def test_a_stream_that_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(TINY.stream, **changes)


def test_the_extremes_of_a_stream_are_allowed() -> None:
    extremes = {"lookahead_ms": 1440, "sink_update_block": 2, "sink_distance": 4, "decoder_warmup_latents": 19}
    assert replace(TINY.stream, **extremes).lookahead_frames == 36  # type: ignore[arg-type]
    assert replace(TINY.stream, speech_window_blocks=1, window_blocks=2, steps=1).past_blocks == 1


def test_a_vae_whose_levels_do_not_match_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"temporal_downsample has 2 entries; dim_mult \(1, 2, 4, 4\) needs 3\."):
        replace(TINY.vae, temporal_downsample=(True, True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"audio_dim": 47},
            r"the DiT takes 5 speech states of width 47; the speech encoder gives 5 of width 48\.",
        ),
        (
            {"audio_states": 4},
            r"the DiT takes 4 speech states of width 48; the speech encoder gives 5 of width 48\.",
        ),
        ({"text_dim": 65}, r"the DiT takes text of width 65; the text encoder gives 64\."),
    ],
)
def test_networks_that_do_not_fit_together_are_refused(changes: dict[str, Any], message: str) -> None:
    dit: DiTConfig = replace(TINY.dit, **changes)
    with pytest.raises(ConfigError, match=message):
        replace(TINY, dit=dit)


def test_an_unknown_preset_is_named_beside_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"there is no preset 'big'; choose one of s2v-14b, tiny\."):
        preset("big")
