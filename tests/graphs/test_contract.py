"""Every contract says what its component really takes and gives."""

from __future__ import annotations

import json

import numpy as np
import pytest

from live_avatar.config import S2V_14B, TINY
from live_avatar.exporter.tracing import random_inputs
from live_avatar.graphs.contract import (
    BLOCK,
    BLOCK_TOKENS,
    DIT,
    SINK,
    SINK_TOKENS,
    TEXT,
    Contract,
    Extent,
    GraphTensor,
    Ranges,
    contracts,
    kv_names,
)
from live_avatar.runtime.torch_runtime import TorchRuntime
from tests.support.networks import SMALL

CONTRACTS = contracts(SMALL)
CASES = [
    pytest.param(name, profile, extent, id=f"{name}-{profile}-{extent.name}" if profile else name)
    for name, contract in CONTRACTS.items()
    for profile in contract.profiles or (None,)
    for extent in (Extent if profile else (Extent.OPT,))
]


def shape_at(spec: GraphTensor, ranges: Ranges, extent: Extent) -> tuple[int, ...]:
    return tuple(ranges[d][extent] if isinstance(d, str) else d for d in spec.shape)


@pytest.mark.parametrize(("name", "profile", "extent"), CASES)
def test_a_component_gives_what_its_contract_says(
    small_runtime: TorchRuntime, name: str, profile: str | None, extent: Extent
) -> None:
    contract = CONTRACTS[name]
    ranges = contract.profiles[profile] if profile else {}
    outputs = small_runtime.graph(name).run(random_inputs(contract, 1, extent, profile))
    assert list(outputs) == [spec.name for spec in contract.outputs]
    for spec in contract.outputs:
        got = outputs[spec.name]
        assert got.shape == shape_at(spec, ranges, extent), spec.name
        assert got.dtype == np.dtype(spec.dtype), spec.name
        assert np.isfinite(got).all(), spec.name


@pytest.mark.parametrize("name", CONTRACTS)
def test_a_contract_survives_json(name: str) -> None:
    contract = CONTRACTS[name]
    assert Contract.from_dict(json.loads(json.dumps(contract.to_dict()))) == contract


@pytest.mark.parametrize("name", CONTRACTS)
def test_names_are_unique_and_every_symbol_has_a_rising_range(name: str) -> None:
    contract = CONTRACTS[name]
    for specs in (contract.inputs, contract.outputs):
        assert len({spec.name for spec in specs}) == len(specs)
    symbols = {d for spec in (*contract.inputs, *contract.outputs) for d in spec.shape if isinstance(d, str)}
    assert bool(symbols) == bool(contract.profiles)
    for ranges in contract.profiles.values():
        assert symbols == set(ranges)
        assert all(0 <= least <= usual <= greatest for least, usual, greatest in ranges.values())


def test_a_streams_state_comes_back_as_it_went_in() -> None:
    given = [spec for spec in CONTRACTS["vae_decoder"].inputs if spec.name.startswith("state.")]
    for maker in ("vae_decoder_warm_up", "vae_decoder"):
        made = [spec for spec in CONTRACTS[maker].outputs if spec.name.startswith("new_state.")]
        assert [(f"new_{spec.name}", spec.shape) for spec in given] == [(s.name, s.shape) for s in made]


def test_what_one_component_gives_the_next_one_takes() -> None:
    dit = CONTRACTS[DIT]
    taken = {spec.name: spec for spec in dit.inputs}
    given = {spec.name: spec for spec in CONTRACTS[TEXT].outputs}
    assert {name: taken[name] for name in given} == given
    for profile, maker in ((BLOCK, BLOCK_TOKENS), (SINK, SINK_TOKENS)):
        (tokens,) = CONTRACTS[maker].outputs
        assert tokens.shape == dit.shape(taken["tokens"], Extent.MAX, profile)
        written = {spec.name.removeprefix("new_"): dit.shape(spec, Extent.MAX, profile) for spec in dit.outputs[1:]}
        assert list(written) == [name.removeprefix("history_") for name in taken if name.startswith("history_")]
        if profile == SINK:
            kept = {name: dit.shape(taken[f"sink_{name}"], Extent.MAX, BLOCK) for name in written}
            assert written == kept


def test_the_14b_contracts_are_made_without_its_weights() -> None:
    made = contracts(S2V_14B)
    dit = made[DIT]
    assert dit.profiles[BLOCK]["history_tokens"] == (0, 3 * 3168, 3 * 3168)
    specs = {spec.name: spec for spec in dit.inputs}
    assert dit.shape(specs["sink_k.39"], Extent.MAX, BLOCK) == (1, 40, 2640, 128)
    assert made["vae_decoder"].outputs[0].shape == (4, 704, 384, 3)
    assert made["speech_encoder"].profiles["window"]["samples"] == (7680, 76_800, 76_800)
    assert len(dit.inputs) == 8 + 3 * 2 * 40


def test_names_of_keys_and_values() -> None:
    assert kv_names("sink", 2) == ("sink_k.0", "sink_v.0", "sink_k.1", "sink_v.1")


def test_contracts_follow_the_preset() -> None:
    assert contracts(TINY).keys() == CONTRACTS.keys()
    assert contracts(TINY) != CONTRACTS


def test_an_fp8_cache_changes_the_type_of_the_history_alone() -> None:
    plain, fp8 = (contracts(SMALL.with_kv_cache_dtype(dtype)) for dtype in (None, "fp8"))
    assert {name for name, contract in fp8.items() if contract != plain[name]} == {DIT}
    assert fp8[DIT].outputs == plain[DIT].outputs
    changed = [new for old, new in zip(plain[DIT].inputs, fp8[DIT].inputs, strict=True) if old != new]
    assert [spec.name for spec in changed] == list(kv_names("history", SMALL.dit.num_layers))
    assert {spec.dtype for spec in changed} == {"float8_e4m3fn"}
