"""Self-forcing: the generator makes a window like a stream, from its own past (section 3.2, Algorithm 1).

History corrupt: the cache of a step has the keys and values of that step's own noisy passes. So a window needs only
the steps up to a random exit step, and no pass over clean latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from live_avatar.model.dit import KV, CausalDiT
from live_avatar.model.schedule import make_schedule
from training.encoded import EncodedClip
from training.flow import mixed, moved
from training.window import Place, Window


@dataclass(frozen=True)
class Rules:
    """Differences from the released rollout. Steps and replacement of the sink follow the stream's configuration.

    clean_history: every step gets the keys and values of the clean past, from one more pass at timestep 0 (NFE of
    steps + 1). history_noise: largest level of noise that is mixed into the latents for the cache (section 4.2). It
    needs one more pass per step; otherwise the prediction would also come from latents noisier than the timestep.
    """

    clean_history: bool = False
    history_noise: float = 0.0


@dataclass(frozen=True)
class RolloutInput:
    """Inputs of a rollout: noise [1, 16, F, h, w] of the window; `replaces`: whether the sink is replaced.

    exit_step counts from 0; its prediction of the clean latents is the result. A stream shows that of the last step.
    """

    clip: EncodedClip
    place: Place
    noise: Tensor
    exit_step: int
    replaces: bool


@dataclass
class Rollout:
    """A generated window, block by block.

    inputs: noisy latents at the exit step. written: keys and values at the exit step for later blocks, without graph.
    clean: predictions of the exit step. late: the latent that replaced the reference, or None.
    """

    inputs: list[Tensor] = field(default_factory=list)
    written: list[KV] = field(default_factory=list)
    clean: list[Tensor] = field(default_factory=list)
    late: Tensor | None = None

    @property
    def latents(self) -> Tensor:
        """The predictions of all blocks, [1, 16, F, h, w]."""
        return torch.cat(self.clean, dim=2)


Pass = Callable[[Tensor, float, Sequence[KV]], tuple[Tensor, KV]]
"""`Window.block` of one block: its latent, level and past give its velocity, and its keys and values."""


class Roller:
    """Rollouts of windows under the given rules, without state."""

    def __init__(self, window: Window, rules: Rules | None = None) -> None:
        self.window = window
        self.rules = rules or Rules()
        self.levels = make_schedule(window.stream).sigmas

    @property
    def steps(self) -> int:
        return len(self.levels) - 1

    def roll_out(self, dit: CausalDiT, given: RolloutInput, draw: torch.Generator, gradient: bool = False) -> Rollout:
        """Generates a window; with `gradient`, the predictions have the graph of the exit step's passes."""
        with torch.set_grad_enabled(gradient):
            made, scene = Rollout(), self.window.open(dit, given.clip)
            caches: list[list[KV]] = [[] for _ in range(self.steps)]
            for index, noise in enumerate(self.window.blocks_of(given.noise)):
                if made.late is not None and index == self.window.late_index:
                    scene = self.window.replaced(dit, scene, given.clip, made.late)
                run = partial(self.window.block, dit, scene, given.place, index)
                self._make(made, run, caches, noise, given, draw)
        return made

    def predicted(self, latent: Tensor, velocity: Tensor, exit_step: int) -> Tensor:
        """The clean latents from the exit step's velocity."""
        return moved(latent, velocity, self.levels[exit_step], 0.0)

    def _make(
        self,
        made: Rollout,
        run: Pass,
        caches: list[list[KV]],
        latent: Tensor,
        given: RolloutInput,
        draw: torch.Generator,
    ) -> None:
        """Generates one block: up to its exit step without gradient, and one pass there."""
        exit_step, levels = given.exit_step, self.levels
        for step in range(exit_step):
            with torch.no_grad():
                velocity, written = run(latent, levels[step], caches[step])
                self._remember(caches[step], run, latent, levels[step], written, draw)
                latent = moved(latent, velocity, levels[step], levels[step + 1])
        velocity, written = run(latent, levels[exit_step], caches[exit_step])
        made.inputs.append(latent)
        made.clean.append(self.predicted(latent, velocity, exit_step))
        with torch.no_grad():
            self._remember(caches[exit_step], run, latent, levels[exit_step], written, draw)
            if self.rules.clean_history:
                self._remember_clean(caches, run, made.clean[-1])
            if len(made.clean) == 1 and given.replaces and self.window.late_index is not None:
                made.late = self._finished(run, latent, velocity, exit_step)[:, :, :1]
        made.written.append(caches[exit_step][-1])

    def _remember(
        self, cache: list[KV], run: Pass, latent: Tensor, level: float, written: KV, draw: torch.Generator
    ) -> None:
        """Writes a block into the cache of its step: from its own pass, or from noisier latents."""
        if self.rules.clean_history:
            return
        if self.rules.history_noise:
            share = self.rules.history_noise * torch.rand((), generator=draw).item()
            noise = torch.randn(latent.shape, generator=draw).to(latent)
            _, written = run(mixed(latent, noise, share), level, cache)
        self._append(cache, [(key.detach(), value.detach()) for key, value in written])

    def _remember_clean(self, caches: list[list[KV]], run: Pass, clean: Tensor) -> None:
        """Writes a block's clean latents into every step's cache, with one more pass."""
        _, written = run(clean, 0.0, caches[0])
        for cache in caches:
            self._append(cache, written)

    def _append(self, cache: list[KV], written: KV) -> None:
        """Adds a block to a cache, and frees what no later block sees."""
        cache.append(written)
        del cache[: -self.window.stream.past_blocks]

    def _finished(self, run: Pass, latent: Tensor, velocity: Tensor, exit_step: int) -> Tensor:
        """The first block after all steps: clean latents replace the sink at every exit step."""
        for step in range(exit_step + 1, self.steps):
            latent = moved(latent, velocity, self.levels[step - 1], self.levels[step])
            velocity, _ = run(latent, self.levels[step], [])
        return moved(latent, velocity, self.levels[self.steps - 1], 0.0)
