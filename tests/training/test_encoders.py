"""The encoders' stage: windows as the stream has them, heads that read them, and learning."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from live_avatar.model.networks import speech_network
from tests.tolerances import STREAMED
from tests.training.conftest import SMALL, toy_config
from training.data.speech import make_utterance
from training.data.split import Split
from training.data.visemes import VISEMES
from training.encoded import speech_windows
from training.encoders import LOOKS, EncoderTraining, Heard, LooksHead, MouthHead, Window, frame_states

pytestmark = pytest.mark.usefixtures("small")


def test_a_batch_of_windows_is_each_on_its_own() -> None:
    """Windows of one length and different streams run together; a stream's own states are `Conditioner`'s."""
    windows = []
    for seed in range(2):
        utterance = make_utterance(Split.TRAIN, seed, 3)
        seen = speech_windows(utterance.speech, SMALL)[-1]
        windows.append(Window(seen, utterance.mouth[-12:], utterance.viseme[-12:]))
    with torch.no_grad():
        network = speech_network(SMALL.speech)
        together = frame_states(network, windows)
        alone = torch.cat([frame_states(network, [window]) for window in windows], dim=1)
    assert together.shape == (SMALL.dit.audio_states, 2, 12, SMALL.dit.audio_dim)
    assert (together - alone).abs().max() <= STREAMED * alone.abs().max()


def test_every_state_reaches_the_mouths_head() -> None:
    """The transformer mixes the states equally at first, so all of them shall learn the mouth."""
    head, states = MouthHead(8), torch.randn(5, 2, 12, 8, requires_grad=True)
    shape, viseme = head(states)
    assert shape.shape == (2, 12, 2)
    assert viseme.shape == (2, 12, len(VISEMES))
    (shape.sum() + viseme.sum()).backward()
    assert states.grad is not None
    assert all(torch.equal(one, states.grad[0]) for one in states.grad)
    assert states.grad.any()


def test_the_looks_head_does_not_see_padding() -> None:
    head, features = LooksHead(8), torch.randn(2, 4, 8)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    padded = features.clone()
    padded[0, 2:] = 100.0
    ours, theirs = head(features, mask), head(padded, mask)
    assert {look: logits.shape[1] for look, logits in ours.items()} == {look: len(v) for look, v in LOOKS.items()}
    assert all(torch.equal(ours[look], theirs[look]) for look in LOOKS)


def test_figures_are_of_the_truth() -> None:
    shape = torch.rand(3, 12, 2)
    viseme = torch.randint(len(VISEMES), (3, 12))
    logits = torch.nn.functional.one_hot(viseme, len(VISEMES)).float()
    exact = Heard(shape, logits, shape, viseme).figures()
    assert exact == pytest.approx({"opening_r": 1.0, "width_r": 1.0, "viseme_share": 1.0})
    inverse = Heard(1 - shape, -logits, shape, viseme).figures()
    assert inverse["opening_r"] == pytest.approx(-1.0)
    assert inverse["viseme_share"] == 0.0


@pytest.mark.slow
def test_the_stage_learns_to_hear_and_to_read() -> None:
    """What it is told again and again."""
    config = toy_config()
    stage = EncoderTraining(replace(config, encoders=replace(config.encoders, batch=4)))
    for group in stage.optimizers["all"].param_groups:
        group["lr"] = 3e-3
    figures = [stage.step(1) for _ in range(10)]
    for name in ("speech_loss", "text_loss"):
        losses = [one[name] for one in figures]
        assert losses[-1] < 0.9 * losses[0], name


def test_a_step_is_that_of_its_number_and_sees_new_voices() -> None:
    steps = [EncoderTraining(toy_config()).step(number) for number in (1, 1, 2)]
    assert steps[0] == steps[1] != steps[2]


def test_the_products_are_the_encoders_without_heads() -> None:
    stage = EncoderTraining(toy_config())
    assert set(stage.outputs()) == {"speech", "text"}
    assert set(stage.modules) == {"speech", "text", "mouth_head", "looks_head"}
