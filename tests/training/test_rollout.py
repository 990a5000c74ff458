"""Self-forcing rollouts: the stream's own, and what each rule changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from live_avatar.assets import PORTRAIT
from live_avatar.model.dit import CausalDiT
from live_avatar.pipeline.avatar import AvatarEncoder
from live_avatar.pipeline.conditioning import block_noise
from live_avatar.pipeline.generator import Generator
from live_avatar.runtime.torch_runtime import TorchRuntime
from live_avatar.weights.checkpoint import load_networks, open_checkpoint
from tests.conftest import SEED, noise_speech
from tests.tolerances import STREAMED
from tests.training.conftest import SMALL, Heard, drawn_clip, drawn_network
from training.encoded import EncodedClip
from training.rollout import Roller, Rollout, RolloutInput, Rules
from training.window import Place, Window

BLOCKS = 7
STEPS = SMALL.stream.steps
PROMPT = "A person talks."


@pytest.mark.parametrize("update", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_a_rollout_of_all_steps_is_the_generators_stream(update: int) -> None:
    blocks = update + 1
    preset = SMALL.with_stream(sink_update_block=update)
    runtime = Heard(TorchRuntime(open_checkpoint(preset)))
    speech = noise_speech(blocks * 0.48)
    expected = list(Generator(runtime).generate(PORTRAIT.read_bytes(), PROMPT, SEED, speech))
    source = AvatarEncoder(runtime).encode_image(PORTRAIT.read_bytes(), PROMPT)
    noise = [block_noise(SEED, block, (1, *preset.stream.latent_shape)) for block in range(blocks)]
    clip = replace(
        drawn_clip(blocks),
        reference=torch.from_numpy(source.reference),
        motion=torch.from_numpy(source.motion),
        text=torch.from_numpy(source.text),
        states=torch.from_numpy(np.stack(runtime.states[:blocks])),
    )
    place = Place(first_block=0, distance=preset.stream.sink_distance)
    given = RolloutInput(clip, place, torch.from_numpy(np.concatenate(noise, axis=2)), STEPS - 1, replaces=True)
    dit = load_networks(open_checkpoint(preset)).dit
    made = Roller(Window(preset, blocks)).roll_out(dit, given, torch.Generator())
    for ours, theirs in zip(made.clean, expected, strict=True):
        error = np.abs(ours.numpy() - theirs.latents).max()
        assert error <= STREAMED * np.abs(theirs.latents).max(), f"block {theirs.index}"


@pytest.fixture(scope="module")
def dit() -> CausalDiT:
    return drawn_network().requires_grad_(False)


@pytest.fixture(scope="module")
def clip() -> EncodedClip:
    return drawn_clip(BLOCKS)


def rolled(dit: CausalDiT, clip: EncodedClip, exit_step: int, replaces: bool = False, **rules: Any) -> Rollout:
    window = Window(SMALL, BLOCKS)
    noise = window.noise(torch.Generator().manual_seed(8))
    given = RolloutInput(clip, Place(0, 30), noise, exit_step, replaces)
    return Roller(window, Rules(**rules)).roll_out(dit, given, torch.Generator().manual_seed(9))


def same_blocks(one: Rollout, other: Rollout) -> list[bool]:
    return [torch.equal(a, b) for a, b in zip(one.clean, other.clean, strict=True)]


class Passes:
    """Counts the passes of a network over noisy tokens and keeps their histories' sizes, while it is open."""

    def __init__(self, dit: CausalDiT) -> None:
        self.histories: list[int] = []
        self._hook = dit.register_forward_pre_hook(self._see)

    def _see(self, _: object, given: tuple[Any, ...]) -> None:
        if given[1].sink[0][0].shape[2]:  # not the prefill of a sink
            self.histories.append(len(given[1].history))

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


@pytest.mark.parametrize("exit_step", range(STEPS))
def test_a_step_sees_its_own_window_and_no_step_after_the_exit_is_run(
    dit: CausalDiT, clip: EncodedClip, exit_step: int
) -> None:
    with Passes(dit) as passes:
        rolled(dit, clip, exit_step)
    assert passes.histories == [min(block, 3) for block in range(BLOCKS) for _ in range(exit_step + 1)]


def test_a_clean_history_costs_one_more_pass_for_every_block(dit: CausalDiT, clip: EncodedClip) -> None:
    with Passes(dit) as passes:
        clean = rolled(dit, clip, STEPS - 1, clean_history=True)
    assert passes.histories == [min(block, 3) for block in range(BLOCKS) for _ in range(STEPS + 1)]
    assert same_blocks(clean, rolled(dit, clip, STEPS - 1)) == [True] + [False] * (BLOCKS - 1)


def test_a_clean_history_is_what_a_pass_over_the_clean_latents_writes(dit: CausalDiT, clip: EncodedClip) -> None:
    made = rolled(dit, clip, exit_step=1, clean_history=True)
    window = Window(SMALL, BLOCKS)
    scene, place = window.open(dit, clip), Place(0, 30)
    _, first = window.block(dit, scene, place, 0, made.clean[0], 0.0, [])
    _, second = window.block(dit, scene, place, 1, made.clean[1], 0.0, [first])
    for expected, written in zip((first, second), made.written, strict=False):
        assert all(
            torch.equal(a, b) for pair in zip(expected, written, strict=True) for a, b in zip(*pair, strict=True)
        )


def test_noise_on_the_history_changes_later_blocks_only(dit: CausalDiT, clip: EncodedClip) -> None:
    plain = rolled(dit, clip, 2)
    assert all(same_blocks(plain, rolled(dit, clip, 2, history_noise=0.0)))
    noisy = rolled(dit, clip, 2, history_noise=0.3)
    assert same_blocks(plain, noisy) == [True] + [False] * (BLOCKS - 1)
    assert same_blocks(noisy, rolled(dit, clip, 2, history_noise=0.3)) == [True] * BLOCKS


@pytest.mark.parametrize("exit_step", range(STEPS))
def test_the_replaced_sink_is_the_finished_first_frame_whatever_the_exit(
    dit: CausalDiT, clip: EncodedClip, exit_step: int
) -> None:
    made, kept = rolled(dit, clip, exit_step, replaces=True), rolled(dit, clip, exit_step)
    finished = rolled(dit, clip, STEPS - 1).clean[0][:, :, :1]
    assert kept.late is None
    assert made.late is not None
    assert torch.equal(made.late, finished)
    assert same_blocks(made, kept) == [block < 4 for block in range(BLOCKS)]


def test_gradients_are_those_of_the_exit_step_alone(clip: EncodedClip) -> None:
    """The history and the latents that a block was given are constants to it."""
    dit = drawn_network()
    window = Window(SMALL, BLOCKS)
    given = RolloutInput(clip, Place(0, 30), window.noise(torch.Generator().manual_seed(8)), 2, replaces=True)
    made = Roller(window).roll_out(dit, given, torch.Generator(), gradient=True)
    assert made.late is not None
    constants = [*made.inputs, made.late, *(tensor for kv in made.written for pair in kv for tensor in pair)]
    assert not any(tensor.requires_grad for tensor in constants)
    assert all(clean.requires_grad for clean in made.clean)
    without = Roller(window).roll_out(dit, given, torch.Generator())
    assert not without.latents.requires_grad
    assert torch.equal(without.latents, made.latents.detach())
