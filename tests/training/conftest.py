"""What the tests of the transformer's stages share: a small preset, networks that are nowhere silent, drawn clips."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from live_avatar import interrupts
from live_avatar.arrays import Array, Arrays
from live_avatar.config import MOTION_LATENTS, PRESETS, TINY, Preset, VAEConfig
from live_avatar.model.dit import CausalDiT
from live_avatar.runtime import Graph
from live_avatar.runtime.torch_runtime import TorchRuntime
from tests.tolerances import STREAMED
from training import encoders, reconstruction, vae
from training.config import (
    DataConfig,
    DecoderStage,
    DistillationStage,
    DiTStage,
    EncoderStage,
    MouthStage,
    TeacherStage,
    TrainingConfig,
    VAEStage,
)
from training.encoded import EncodedClip
from training.init import fresh
from training.roles import Role, whole

Handlers = dict[signal.Signals, Any]

SMALL = replace(
    TINY,
    name="small",
    dit=replace(TINY.dit, dim=32, num_heads=2, num_layers=3, ffn_dim=48, text_len=8, audio_inject_layers=(0, 2)),
    vae=VAEConfig(dim=2),
).with_stream(height=64, width=64)


def drawn_network(preset: Preset = SMALL, seed: int = 3) -> CausalDiT:
    """A network to train whose every parameter is drawn, gates, norms and zeroes included."""
    draw = torch.Generator().manual_seed(seed)
    dit = fresh(preset.dit, draw)
    with torch.no_grad():
        for parameter in dit.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * fan_in**-0.5)
    return dit


def three(dit: CausalDiT | None = None) -> tuple[Role, Role, Role]:
    """The generator, the real score and the fake score, which begins as the real one."""
    real = drawn_network(seed=2).requires_grad_(False)
    return whole(dit or drawn_network(seed=1)), whole(real), whole(drawn_network(seed=2))


def drawn_clip(blocks: int, seed: int = 5, preset: Preset = SMALL) -> EncodedClip:
    """A clip of noise in the shapes of the preset; its speech is told from silence."""
    draw = torch.Generator().manual_seed(seed)
    stream, config = preset.stream, preset.dit
    grid = (stream.latent_height, stream.latent_width)
    motion = torch.randn(1, 16, MOTION_LATENTS, *grid, generator=draw)
    states = torch.randn(blocks, config.audio_states, config.audio_dim, stream.block_frames, generator=draw)
    return EncodedClip(
        reference=motion[:, :, :1],
        motion=motion,
        text=torch.randn(config.text_len, config.text_dim, generator=draw),
        states=states,
        silence=torch.zeros_like(states),
        latents=torch.randn(1, 16, blocks * stream.frames_per_block, *grid, generator=draw),
    )


@dataclass
class Heard:
    """A runtime that keeps what its `audio_tokens` was given."""

    runtime: TorchRuntime
    states: list[Array] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runtime, name)

    def graph(self, component: str) -> Graph:
        graph = self.runtime.graph(component)
        return Listening(graph, self.states) if component == "audio_tokens" else graph


@dataclass
class Listening:
    graph: Graph
    heard: list[Array]

    def run(self, inputs: Arrays) -> dict[str, Array]:
        self.heard.append(inputs["states"])
        return self.graph.run(inputs)


def gradients(dit: CausalDiT) -> dict[str, Tensor]:
    """The gradients that there are, by parameter."""
    return {name: one.grad.clone() for name, one in dit.named_parameters() if one.grad is not None}


def differing(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not the same but for rounding, relative to the largest value of each."""
    assert ours.keys() == expected.keys()
    return [name for name, one in expected.items() if (ours[name] - one).abs().max() > STREAMED * one.abs().max()]


def relative_error(ours: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value."""
    return float((ours - expected).detach().abs().max() / expected.detach().abs().max())


def toy_config(**changes: Any) -> TrainingConfig:
    """A whole run of a few steps with the preset `small`, which the fixture of that name registers."""
    few: dict[str, Any] = {"steps": 2, "batch": 1, "learning_rate": 1e-3, "warmup_steps": 1, "checkpoint_every": 1}
    stages = {
        "vae": VAEStage(**few, frames=5),
        "mouths": MouthStage(**few, frames=5, mouth_batch=1),
        "encoders": EncoderStage(**few),
        "decoder": DecoderStage(**few, frames=5, mouth_batch=1, channels=(16, 8, 8, 8)),
        "teacher": TeacherStage(**few, blocks=2),
        "stage1": DiTStage(**few, blocks=2),
        "stage2": DistillationStage(**few, blocks=2, fake_steps=1),
    }
    return TrainingConfig(**{**stages, "data": DataConfig(2, 1, 2), "preset": SMALL.name, **changes})


def handlers_of_signals() -> Handlers:
    """Of Ctrl-C and its kin, to be put back: a run that one of them has ended leaves them ignored."""
    return {number: signal.getsignal(number) for number in interrupts.SIGNALS}


def restore_handlers(handlers: Handlers) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    handlers = handlers_of_signals()
    yield
    restore_handlers(handlers)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small preset among the known ones; the VAE stage looks at few clips."""
    monkeypatch.setitem(cast(dict[str, Preset], PRESETS), SMALL.name, SMALL)
    monkeypatch.setattr(reconstruction, "VALIDATION_CLIPS", 1)
    monkeypatch.setattr(vae, "STATISTICS_CLIPS", 2)
    monkeypatch.setattr(encoders, "VALIDATION_UTTERANCES", 2)
    monkeypatch.setattr(encoders, "VALIDATION_PROMPTS", 4)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small gain nothing from a second thread, and on a busy machine they wait for it at every sum."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(1)
