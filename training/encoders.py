"""Stage 0c: the speech encoder learns mouth shapes from sound, and the text encoder looks from a prompt.

There are no public encoders of the tiny preset's sizes, and the transformer's stages are too short to train them on
video alone. Each encoder gets a linear head for this stage, which is dropped afterwards. The speech is cut into the
windows of the stream, so a frame gets no speech after its block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from live_avatar.arrays import Array
from live_avatar.inputs.text import make_tokenizer
from live_avatar.model.networks import speech_network, text_network
from training.config import TrainingConfig
from training.data.identity import BACKGROUNDS, CLOTHES, EYES, GLASSES, HAIR, SKIN, STYLES, Identity, draw_identity
from training.data.speech import Utterance, make_utterance
from training.data.split import Split
from training.data.visemes import VISEMES
from training.encoded import speech_windows
from training.loop import clip_gradients, generator

STAGE = "encoders"
UTTERANCE_BLOCKS = 8
PROMPTS_PER_UTTERANCE = 4
VALIDATION_UTTERANCES, VALIDATION_PROMPTS = 32, 256
SHAPE_WEIGHT, VISEME_WEIGHT = 10.0, 0.1
"""Weights of the mean square error of opening and width, and of the cross-entropy of visemes; they balance the two."""
LOOKS: Mapping[str, tuple[str, ...]] = {
    "person": tuple(STYLES),
    "hair": tuple(HAIR),
    "skin": tuple(SKIN),
    "eyes": tuple(EYES),
    "clothes": tuple(CLOTHES),
    "background": tuple(BACKGROUNDS),
    "glasses": tuple(dict.fromkeys(GLASSES)),
}
ALWAYS_TOLD = ("person", "background", "glasses")
"""Looks that every prompt names; only some prompts name the others."""


class MouthHead(nn.Module):
    """Predicts the mouth from the mean of the speech encoder's states, like a new audio encoder of the transformer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shape = nn.Linear(width, 2)
        self.viseme = nn.Linear(width, len(VISEMES))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """[K, B, 12, A] -> opening and width [B, 12, 2], logits of visemes [B, 12, V]."""
        mixed = states.mean(0)
        return self.shape(mixed), self.viseme(mixed)


class LooksHead(nn.ModuleDict):
    """Predicts the looks from the mean of a prompt's features."""

    def __init__(self, width: int) -> None:
        super().__init__({look: nn.Linear(width, len(values)) for look, values in LOOKS.items()})

    def forward(self, features: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """features [B, L, C], mask [B, L] -> logits [B, values] of every look."""
        pooled = (features * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return {look: head(pooled) for look, head in self.items()}


@dataclass(frozen=True)
class Heard:
    """Predictions for the frames of some windows, and the truth.

    shape, true_shape [B, 12, 2]; viseme [B, 12, V] logits, true_viseme [B, 12].
    """

    shape: Tensor
    viseme: Tensor
    true_shape: Tensor
    true_viseme: Tensor

    def loss(self) -> Tensor:
        entropy = F.cross_entropy(self.viseme.flatten(0, 1), self.true_viseme.flatten())
        return SHAPE_WEIGHT * F.mse_loss(self.shape, self.true_shape) + VISEME_WEIGHT * entropy

    def figures(self) -> dict[str, float]:
        """Correlations of opening and width with the truth, and the share of correct visemes."""
        right = (self.viseme.argmax(-1) == self.true_viseme).float().mean()
        shapes = zip(("opening", "width"), self.shape.unbind(-1), self.true_shape.unbind(-1), strict=True)
        return {**{f"{name}_r": _correlation(made, true) for name, made, true in shapes}, "viseme_share": float(right)}


def _correlation(made: Tensor, true: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([made.flatten(), true.flatten()]))[0, 1])


@dataclass(frozen=True)
class Window:
    """The encoder's input at a block (see `speech_windows`), and the true mouth [12, 2] and visemes [12]."""

    seen: tuple[Array, Array]
    mouth: Array
    viseme: Array


def _length(window: Window) -> int:
    return int(window.seen[0].shape[1])


def frame_states(speech: nn.Module, windows: Sequence[Window]) -> Tensor:
    """Windows of one length -> the speech encoder's states at the frames of their newest blocks, [K, B, 12, A]."""
    samples = torch.from_numpy(np.concatenate([window.seen[0] for window in windows]))
    frames = torch.from_numpy(np.stack([window.seen[1] for window in windows]))
    return frames @ torch.stack(speech(samples, output_hidden_states=True).hidden_states)


class EncoderTraining:
    """The stage: see `training.loop.Stage`."""

    def __init__(self, config: TrainingConfig) -> None:
        self._preset = config.system
        self._settings = config.encoders
        self._seed = config.seed
        self._tokenizer = make_tokenizer(self._preset, None)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(config.seed, STAGE, "start").initial_seed())
            self._speech = speech_network(self._preset.speech)
            self._text = text_network(self._preset.text)
            self._mouth = MouthHead(self._preset.speech.hidden_size)
            self._looks = LooksHead(self._preset.text.d_model)
        self.modules: Mapping[str, nn.Module] = {
            "speech": self._speech,
            "text": self._text,
            "mouth_head": self._mouth,
            "looks_head": self._looks,
        }
        self._parameters = [parameter for module in self.modules.values() for parameter in module.parameters()]
        self.optimizers: Mapping[str, Optimizer] = {
            "all": AdamW(self._parameters, weight_decay=self._settings.weight_decay)
        }

    def outputs(self) -> Mapping[str, nn.Module]:
        """The encoders without their heads."""
        return {"speech": self._speech, "text": self._text}

    def step(self, number: int) -> dict[str, float]:
        """`batch` utterances and four times as many prompts, all new. `loss` is the sum of the two encoders'."""
        batch, prompts = self._settings.batch, PROMPTS_PER_UTTERANCE * self._settings.batch
        speech_loss = self._hear(_utterances(Split.TRAIN, (number - 1) * batch, batch)).loss()
        text_loss = self._read(_people(Split.TRAIN, (number - 1) * prompts, prompts))[0]
        self.optimizers["all"].zero_grad()
        (speech_loss + text_loss).backward()
        norm = clip_gradients(self._parameters, self._settings.clip_norm)
        self.optimizers["all"].step()
        losses = {"speech_loss": speech_loss.item(), "text_loss": text_loss.item()}
        return {"loss": sum(losses.values()), **losses, "gradient_norm": norm}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Figures for unseen voices and faces: see `Heard.figures`, and the share of correct looks."""
        heard = self._hear(_utterances(Split.VALIDATION, 0, VALIDATION_UTTERANCES))
        _, share = self._read(_people(Split.VALIDATION, 0, VALIDATION_PROMPTS))
        return {"speech_loss": heard.loss().item(), **heard.figures(), "looks_share": share}

    def _hear(self, utterances: Iterable[Utterance]) -> Heard:
        """Every window of every utterance, those of one length at a time."""
        parts = [part for utterance in utterances for part in self._windows(utterance)]
        parts.sort(key=_length)
        made = [self._mouth(frame_states(self._speech, list(alike))) for _, alike in groupby(parts, _length)]
        shapes, visemes = zip(*made, strict=True)
        return Heard(
            torch.cat(shapes),
            torch.cat(visemes),
            torch.from_numpy(np.stack([part.mouth for part in parts])),
            torch.from_numpy(np.stack([part.viseme for part in parts])),
        )

    def _windows(self, utterance: Utterance) -> list[Window]:
        """The windows of an utterance, with the truth for the newest block of each."""
        frames = self._preset.stream.block_frames
        mouths = utterance.mouth.reshape(-1, frames, 2)
        visemes = utterance.viseme.reshape(-1, frames)
        windows = speech_windows(utterance.speech, self._preset)
        return [Window(*facts) for facts in zip(windows, mouths, visemes, strict=True)]

    def _read(self, people: Sequence[Identity]) -> tuple[Tensor, float]:
        """Loss over all looks, and the share of correct looks among those that every prompt names."""
        ids, masks = zip(*(self._tokenizer.encode(person.prompt) for person in people), strict=True)
        mask = torch.from_numpy(np.concatenate(masks))
        longest = int(mask.sum(1).max())  # padding is masked, so shorter rows give the same result in less time
        mask = mask[:, :longest]
        tokens = torch.from_numpy(np.concatenate(ids)[:, :longest])
        features = self._text(input_ids=tokens, attention_mask=mask).last_hidden_state
        logits = self._looks(features, mask)
        true = {look: torch.tensor([v.index(p.looks[look]) for p in people]) for look, v in LOOKS.items()}
        losses = [F.cross_entropy(logits[look], true[look]) for look in LOOKS]
        right = [(logits[look].argmax(-1) == true[look]).float().mean() for look in ALWAYS_TOLD]
        return torch.stack(losses).mean(), float(torch.stack(right).mean())


def make_stage(config: TrainingConfig, out: Path) -> EncoderTraining:
    """The stage of a run; it needs no files in `out`."""
    return EncoderTraining(config)


def _utterances(split: Split, first: int, count: int) -> list[Utterance]:
    return [make_utterance(split, seed, UTTERANCE_BLOCKS) for seed in range(first, first + count)]


def _people(split: Split, first: int, count: int) -> list[Identity]:
    return [draw_identity(split, seed) for seed in range(first, first + count)]
