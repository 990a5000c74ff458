"""Calibration: what it sees, with weights in memory while they run only, and how it goes on after an interruption."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from export.calibrate import ObservedRuntime, calibrate, facts, main
from export.passes import Passes
from export.streamed import streamed_networks
from live_avatar.arrays import Array
from live_avatar.errors import ExportError
from live_avatar.exporter.quantization import PART, Calibration
from live_avatar.exporter.tracing import random_inputs
from live_avatar.graphs.components import build_components
from live_avatar.graphs.contract import BLOCK_TOKENS, DIT, SINK_TOKENS, TEXT, contracts
from live_avatar.model.dit import CausalDiT
from live_avatar.model.linears import is_fp8
from live_avatar.pipeline.denoiser import Denoiser, all_steps
from live_avatar.pipeline.generator import Generator, cut_blocks
from live_avatar.pipeline.sink import SinkSource, first_latent_frame
from live_avatar.runtime.torch_runtime import CPU, TorchRuntime, to_torch
from live_avatar.weights.checkpoint import open_checkpoint
from live_avatar.weights.tensors import Checkpoint, RenamedWeights, Weights
from tests.conftest import noise_speech
from tests.export.conftest import CALIBRATED_BLOCKS, LEAST, TWO_STEPS

BLOCKS = 6
"""Enough for the rings of three blocks to drop some."""


def linears(network: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(TWO_STEPS)


def test_every_quantized_linear_is_seen(calibration: Calibration) -> None:
    with torch.device("meta"):
        names = {PART + name for name in linears(CausalDiT(TWO_STEPS.dit)) if is_fp8(name)}
    text = {f"{PART}blocks.0.cross_attn.{part}" for part in "kv"}
    assert calibration.blocks == CALIBRATED_BLOCKS
    assert {component: set(amax) for component, amax in calibration.amax.items()} == {
        DIT: names - text,
        TEXT: text,
    }
    assert min(value for amax in calibration.amax.values() for value in amax.values()) > 0
    amax = calibration.amax[DIT]
    assert amax["dit.blocks.0.self_attn.q"] == amax["dit.blocks.0.self_attn.k"] == amax["dit.blocks.0.self_attn.v"]


def test_inputs_are_those_of_a_stream_of_networks_in_memory(
    checkpoint: Checkpoint, picture: bytes, calibration: Calibration
) -> None:
    """To the bit: weights that come and go change no number, nor do frames that are not decoded."""
    runtime, seen = TorchRuntime(checkpoint), {}

    def note(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[name] = max(seen.get(name, 0.0), args[0].abs().max().item())

    for name, linear in linears(runtime._networks.dit).items():
        if is_fp8(name):
            linear.register_forward_pre_hook(partial(note, PART + name))
    speech = cut_blocks(noise_speech(0.48 * CALIBRATED_BLOCKS), TWO_STEPS.stream)
    assert len(list(Generator(runtime).stream(picture, "", 1, speech))) == CALIBRATED_BLOCKS
    assert {name: value for amax in calibration.amax.values() for name, value in amax.items()} == seen


def test_one_linear_at_a_time_has_its_weight(checkpoint: Checkpoint) -> None:
    runtime, most = ObservedRuntime(checkpoint), 0
    everything = [linear for network in runtime._networks.parts().values() for linear in linears(network).values()]

    def count(*_: object) -> None:
        nonlocal most
        most = max(most, sum(not linear.weight.is_meta for linear in everything))

    for linear in everything:
        linear.register_forward_pre_hook(count)
    for name, contract in contracts(TWO_STEPS).items():
        if not name.startswith("vae"):
            runtime.graph(name).run(random_inputs(contract, seed=0))
    assert most == 1
    assert all(linear.weight.is_meta for linear in everything)


def test_linears_that_have_room_are_read_once(checkpoint: Checkpoint) -> None:
    first = next(iter(linears(streamed_networks(checkpoint, CPU).dit).values()))
    networks = streamed_networks(checkpoint, CPU, keep_bytes=first.weight.nbytes)
    kept = [linear for network in networks.parts().values() for linear in linears(network).values()]
    assert [linear.weight.is_meta for linear in kept[:2]] == [False, True]
    assert sum(linear.weight.nbytes for linear in kept if not linear.weight.is_meta) <= first.weight.nbytes
    networks = streamed_networks(checkpoint, CPU, keep_bytes=2**40)
    assert not [
        name
        for network in networks.parts().values()
        for name, parameter in network.named_parameters()
        if parameter.is_meta
    ]


def test_no_component_mixes_devices(checkpoint: Checkpoint) -> None:
    """On torch's meta device, which refuses the CPU's tensors as a GPU does. The text encoder reads values of its mask,
    which that device lacks."""
    networks = streamed_networks(checkpoint, torch.device("meta"))
    components = build_components(TWO_STEPS, networks)
    for name, contract in contracts(TWO_STEPS).items():
        if name != "text_encoder":
            inputs = random_inputs(contract, seed=0)
            with torch.inference_mode():
                made = components[name](*(to_torch(inputs[spec.name]).to("meta") for spec in contract.inputs))
            assert all(tensor.is_meta for tensor in (made if isinstance(made, tuple) else (made,))), name
    assert networks.dit.modulation(1.0).layers.is_meta


def test_an_input_that_is_no_number_ends_a_calibration(checkpoint: Checkpoint) -> None:
    """A maximum over Python floats would pass NaN by."""
    broken = BrokenWeights(checkpoint.parts["dit"])
    runtime = ObservedRuntime(replace(checkpoint, parts={**checkpoint.parts, "dit": broken}))
    with pytest.raises(
        ExportError, match=r"^dit\.audio_injector\..* was given an input of nan, .*try --precision float32"
    ):
        runtime.graph(DIT).run(random_inputs(contracts(TWO_STEPS)[DIT], seed=0))


class BrokenWeights(RenamedWeights):
    """Weights with one number lost."""

    def __init__(self, stored: Weights) -> None:
        super().__init__(stored, {name: name for name in stored.shapes()})

    def read(self, name: str) -> Tensor:
        tensor = super().read(name)
        return tensor.fill_(torch.nan) if name == "blocks.0.ffn.2.bias" else tensor


def test_the_largest_input_of_all_runs_is_kept_and_no_hook_is_left() -> None:
    runtime = ObservedRuntime(open_checkpoint(LEAST), keep_bytes=2**40)
    graph, contract = runtime.graph(DIT), contracts(LEAST)[DIT]
    small, large = random_inputs(contract, seed=1), random_inputs(contract, seed=2)
    large["audio_local"] = 100 * large["audio_local"]
    for inputs in (small, large, small):
        graph.run(inputs)
    seen = runtime.amax[DIT]["dit.audio_injector.injector.0.k"]
    assert seen == np.abs(large["audio_local"]).max()
    for component in runtime.amax:
        modules = runtime._components[component].modules()
        assert not [module for module in modules if module._forward_pre_hooks]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (1, r"1 blocks are too few: the sink is replaced at block 2; calibrate on more\."),
        (3, r"the speech has 2 blocks, 3 were asked for; give a longer one or ask for less\."),
    ],
)
def test_a_stream_that_is_too_short_is_refused(picture: bytes, blocks: int, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        calibrate(open_checkpoint(LEAST), picture, "", noise_speech(0.9), blocks, seed=0)


# ---- Going on


class Interrupted(Passes):
    """Passes that end with Ctrl-C when so many are made; they note those that were made."""

    def __init__(self, folder: Path, most: int = 99) -> None:
        super().__init__(folder, {"seed": "1"}, TWO_STEPS.stream)
        self._most = most
        self.made: list[int] = []

    def store(self, number: int, *args: Any) -> None:
        if number == self._most:
            raise KeyboardInterrupt
        super().store(number, *args)
        self.made.append(number)


def denoised(checkpoint: Checkpoint, passes: Passes | None = None) -> tuple[list[Array], dict[str, dict[str, float]]]:
    """Latents of a stream whose sink is replaced at the second block, and the largest inputs."""
    runtime = ObservedRuntime(checkpoint, passes=passes)
    denoiser, agreed = Denoiser(runtime, all_steps(TWO_STEPS.stream.steps)), contracts(TWO_STEPS)
    motion, text = random_inputs(agreed[SINK_TOKENS], 0)["motion"], random_inputs(agreed[TEXT], 0)["text"]
    source = SinkSource.of(motion, text)
    state = denoiser.open(denoiser.prefill(source))
    latents: list[Array] = []
    for block in range(BLOCKS):
        if block == 1:
            state.sink = denoiser.prefill(source.replaced(first_latent_frame(latents[0])))
        given = random_inputs(agreed[DIT], block)
        audio = {name: given[name] for name in ("audio_local", "audio_global", "audio_weight")}
        latents.append(denoiser.run(state, random_inputs(agreed[BLOCK_TOKENS], block)["latent"], audio))
    return latents, runtime.amax


@pytest.mark.slow
def test_a_calibration_goes_on_where_it_was_interrupted(tmp_path: Path, checkpoint: Checkpoint) -> None:
    whole, amax = denoised(checkpoint)
    folder, done = tmp_path / "c.json.partial", 0
    for most in (1, 12):  # after a prefill, and after the rings have dropped blocks
        passes = Interrupted(folder, most)
        with pytest.raises(KeyboardInterrupt):
            denoised(checkpoint, passes)
        assert passes.made == list(range(done, most))
        done = most
    passes = Interrupted(folder)
    latents, found = denoised(checkpoint, passes)
    assert found == amax
    assert all(np.array_equal(one, other) for one, other in zip(latents, whole, strict=True))
    assert passes.made == list(range(done, 2 + BLOCKS * TWO_STEPS.stream.steps))
    ring = TWO_STEPS.stream.steps * TWO_STEPS.stream.past_blocks
    assert len(list(folder.glob("*.block.pt"))) <= ring + 1 < BLOCKS * TWO_STEPS.stream.steps
    assert len(list(folder.glob("*.sink.pt"))) == 2
    passes.remove()
    assert not folder.exists()


def test_passes_of_another_calibration_are_not_taken(tmp_path: Path, checkpoint: Checkpoint, picture: bytes) -> None:
    stream, speech = checkpoint.preset.stream, noise_speech(0.96)
    begun = facts(checkpoint, picture, "", speech, 1)
    Passes(tmp_path / "p", begun, stream)
    Passes(tmp_path / "p", begun, stream)
    larger = replace(checkpoint, preset=TWO_STEPS.with_stream(width=96))
    drawn = replace(open_checkpoint(replace(TWO_STEPS, weight_seed=9)), preset=TWO_STEPS)
    others = {
        "preset, size, schedule or precision": facts(larger, picture, "", speech, 1),
        "checkpoint or adapter": facts(drawn, picture, "", speech, 1),
        "picture": facts(checkpoint, picture + b"0", "", speech, 1),
        "prompt": facts(checkpoint, picture, "a man", speech, 1),
        "speech": facts(checkpoint, picture, "", speech[:-1], 1),
        "seed": facts(checkpoint, picture, "", speech, 2),
        "version": {**begun, "version": "0.0.0"},
    }
    assert begun.keys() == others.keys()
    for name, other in others.items():
        with pytest.raises(ExportError, match=rf"holds a calibration that was begun with another {name}; give the sam"):
            Passes(tmp_path / "p", other, stream)


def test_damaged_passes_are_explained(tmp_path: Path, checkpoint: Checkpoint) -> None:
    with pytest.raises(KeyboardInterrupt):
        denoised(checkpoint, Interrupted(tmp_path / "p", 2))
    damaged = tmp_path / "p" / "0001.block.pt"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(ExportError, match=r"0001\.block\.pt cannot be read; remove .*p to begin again\."):
        denoised(checkpoint, Interrupted(tmp_path / "p"))
    (tmp_path / "p" / "made_from.json").write_text("{")
    with pytest.raises(ExportError, match=r"made_from\.json cannot be read \(.*\); remove .*p to begin again\."):
        Interrupted(tmp_path / "p")


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file may be larger, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_explained(tmp_path: Path, checkpoint: Checkpoint) -> None:
    passes = Interrupted(tmp_path / "p")
    with (
        small_files(2_000),
        pytest.raises(ExportError, match=r"0000\.sink\.pt cannot be written \(.*\); make room, and give the same comm"),
    ):
        denoised(checkpoint, passes)
    assert Interrupted(tmp_path / "p").done == 0


# ---- The command


def run(*options: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, options)
    return result.exit_code, result.output


def test_the_command_explains_mistakes(tmp_path: Path) -> None:
    output = str(tmp_path / "c.json")
    code, said = run("--output", output, "--preset", "tiny", "--blocks", "4")
    assert code == 1
    assert "4 blocks are too few: the sink is replaced at block 5" in said
    for device, message in (("tpu9", "'tpu9' is no device; give cpu, cuda or cuda:N"), ("cuda:99", "has no 'cuda:99'")):
        code, said = run("--output", output, "--device", device)
        assert code == 2
        assert message in " ".join(said.split())


def test_ctrl_c_leaves_passes_that_the_same_command_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint
) -> None:
    output = tmp_path / "c.json"
    options = ["--output", str(output), "--blocks", "3", "--device", "cpu"]
    monkeypatch.setattr("export.calibrate.chosen_checkpoint", lambda **_: checkpoint)  # smaller than any preset
    store, made = Passes.store, []

    def noted(passes: Passes, number: int, *args: Any) -> None:
        store(passes, number, *args)
        made.append(number)
        if len(made) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Passes, "store", noted)
    code, said = run(*options)
    assert (code, made) == (1, [0, 1])
    assert f"Stopped; the same command goes on from {output}.partial." in said
    assert not output.exists()
    code, said = run(*options)
    assert (code, made) == (0, [*range(2 + 3 * 2)])
    assert f"Wrote {output}" in said
    assert Calibration.read(output).blocks == 3
    assert not output.with_name("c.json.partial").exists()
