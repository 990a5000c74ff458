"""A range of denoising steps with their caches: what one process of the pipeline does to every block.

`Denoiser` holds the graphs; a session's `DenoiserState` holds one ring per step and the prefilled sink. All steps share
one transformer and one sink: a step differs in its modulation alone, and the sink is prefilled at timestep 0 whatever
the step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from live_avatar.arrays import Array
from live_avatar.config import PATCH
from live_avatar.graphs.contract import BLOCK_TOKENS, DIT, SINK_TOKENS, TEXT, kv_names
from live_avatar.model import rope
from live_avatar.model.schedule import make_schedule
from live_avatar.pipeline.kv_cache import KVRing
from live_avatar.pipeline.sink import SinkSource
from live_avatar.runtime import Runtime

Distance = Callable[[int, int], int]
"""Rolling distance of the sink for (block counted from 0, step counted from 1)."""


@dataclass
class DenoiserState:
    """Caches of one session: a ring for every step. `sink` has the text and sink keys and values by name; it may be
    shared, so it is replaced and never written."""

    rings: list[KVRing]
    sink: dict[str, Array]
    blocks: int = 0


class Denoiser:
    """The steps of the schedule in `steps`, counted from 1."""

    def __init__(self, runtime: Runtime, steps: range) -> None:
        self.preset = runtime.preset
        self.steps = steps
        self._zeros = runtime.zeros
        self._schedule = make_schedule(self.preset.stream)
        self._phases = rope.TokenPhases(self.preset.stream, self.preset.dit.head_dim)
        self._modulation = {step: runtime.modulation(step) for step in (0, *steps)}
        self._tokens, self._sink_tokens, self._text, self._dit = (
            runtime.graph(name) for name in (BLOCK_TOKENS, SINK_TOKENS, TEXT, DIT)
        )
        self._none = self._empty_caches()

    def prefill(self, source: SinkSource) -> dict[str, Array]:
        """Text and sink keys and values, to be given to `open` or put into a state (spec section 6)."""
        dit = self.preset.dit
        text = self._text.run({"text": source.text})
        tokens = self._sink_tokens.run({"reference": source.reference, "motion": source.motion})
        speakers = self.preset.stream.speakers
        no_audio = {
            "audio_local": np.zeros((speakers, 1, dit.num_audio_token + 1, dit.dim), dtype=np.float32),
            "audio_global": np.zeros((speakers, 1, dit.dim), dtype=np.float32),
            "audio_weight": np.zeros((speakers, 1, self.preset.stream.sink_tokens), dtype=np.float32),
        }
        made = self._dit.run(
            {
                **tokens,
                **no_audio,
                **self._modulation[0],
                "phase": self._phases.sink()[:, None],
                "sink_turn": np.zeros((2, 0, dit.head_dim // 2), dtype=np.float32),
                **text,
                **self._none,
            }
        )
        return {**text, **self._kept_sink(made)}

    def open(self, sink: dict[str, Array]) -> DenoiserState:
        """State of a new session, from what `prefill` gave."""
        return DenoiserState([KVRing(self.preset, self._zeros) for _ in self.steps], sink)

    def run(
        self, state: DenoiserState, latent: Array, audio: dict[str, Array], distance: Distance | None = None
    ) -> Array:
        """Moves the session's next block [1, 16, F, h, w] through all steps, and writes their rings.

        audio: `audio_local` [speakers, F, n + 1, C], `audio_global` [speakers, F, C] and `audio_weight`
        [speakers, F, S], as `Conditioner` makes them. `distance` overrides the preset's rolling distance of the sink.
        """
        stream = self.preset.stream
        first = state.blocks * stream.frames_per_block
        phase = self._phases.block(first, stream.frames_per_block)
        phase = phase.reshape(2, stream.frames_per_block, stream.frame_tokens, -1)
        for step, ring in zip(self.steps, state.rings, strict=True):
            chosen = distance(state.blocks, step) if distance else stream.sink_distance
            outputs = self._dit.run(
                {
                    **self._tokens.run({"latent": latent}),
                    **audio,
                    **self._modulation[step],
                    "phase": phase,
                    "sink_turn": self._phases.sink_turn(rope.sink_position(first, chosen)),
                    **state.sink,
                    **ring.history(),
                }
            )
            ring.append(outputs)
            latent = self._schedule.euler(step - 1, latent, unpatchified(outputs["patches"], latent.shape))
        state.blocks += 1
        return latent

    def _empty_caches(self) -> dict[str, Array]:
        dit = self.preset.dit
        types = {"sink": self.preset.precision, "history": self.preset.history_dtype}
        return {
            name: self._zeros((1, dit.num_heads, 0, dit.head_dim), dtype)
            for prefix, dtype in types.items()
            for name in kv_names(prefix, dit.num_layers)
        }

    def _kept_sink(self, made: dict[str, Array]) -> dict[str, Array]:
        """The sink in memory of its own: the next run may overwrite the graph's."""
        layers = self.preset.dit.num_layers
        sink = {}
        for new, name in zip(kv_names("new", layers), kv_names("sink", layers), strict=True):
            sink[name] = self._zeros(tuple(made[new].shape), self.preset.precision)
            sink[name][:] = made[new]
        return sink


def unpatchified(patches: Array, shape: tuple[int, ...]) -> Array:
    """[F, S, 2 * 2 * 16] with channels fastest -> [1, 16, F, h, w] (spec section 3, step 6)."""
    _, channels, frames, height, width = shape
    grid = patches.reshape(1, frames, height // PATCH, width // PATCH, PATCH, PATCH, channels)
    return grid.transpose(0, 6, 1, 2, 4, 3, 5).reshape(shape)


def all_steps(steps: int) -> range:
    """The steps of a schedule of so many."""
    return range(1, steps + 1)


def one_step(step: int) -> range:
    """One step alone."""
    return range(step, step + 1)
