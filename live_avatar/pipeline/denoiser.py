"""A range of denoising steps with their caches: what one process of the pipeline does to every block.

`Denoiser` holds the graphs of its steps; a session's `DenoiserState` holds one ring per step and the prefilled sink,
which all steps share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from live_avatar.arrays import Array
from live_avatar.graphs.contract import step_name
from live_avatar.model import rope
from live_avatar.model.schedule import make_schedule
from live_avatar.pipeline.kv_cache import KVRing
from live_avatar.pipeline.sink import SinkSource
from live_avatar.runtime import Runtime

Distance = Callable[[int, int], int]
"""Rolling distance of the sink for (block counted from 0, step counted from 1)."""


@dataclass
class DenoiserState:
    """Caches of one session: one ring per step; `sink` has the prefill's outputs by name, and may be shared: it is
    replaced, never written. blocks: how many the session has run."""

    rings: list[KVRing]
    sink: dict[str, Array]
    blocks: int = 0


class Denoiser:
    """Contiguous steps of the schedule, counted from 1, in order: `range(1, 3)` is steps 1 and 2."""

    def __init__(self, runtime: Runtime, steps: range) -> None:
        self.preset = runtime.preset
        self.steps = steps
        self._zeros = runtime.zeros
        self._schedule = make_schedule(self.preset.stream)
        self._graphs = [runtime.graph(step_name(step)) for step in steps]
        self._prefill = runtime.graph("dit_prefill")

    def prefill(self, source: SinkSource) -> dict[str, Array]:
        """Text and sink keys and values of a sink, the same for every step, to be given to `open` or put into a
        state."""
        inputs = {"reference": source.reference, "motion": source.motion, "text": source.text}
        return self._prefill.run(inputs)

    def open(self, sink: dict[str, Array]) -> DenoiserState:
        """State of a new session, from what `prefill` gave."""
        return DenoiserState([KVRing(self.preset, self._zeros) for _ in self.steps], sink)

    def run(
        self, state: DenoiserState, latent: Array, audio: dict[str, Array], distance: Distance | None = None
    ) -> Array:
        """Moves the session's next block [1, 16, F, h, w] down by all noise levels and writes every step's ring.

        `distance` overrides the preset's rolling distance of the sink.
        """
        stream, head_dim = self.preset.stream, self.preset.dit.head_dim
        first = state.blocks * stream.frames_per_block
        block_phase = rope.time_phase(np.arange(first, first + stream.frames_per_block), head_dim)
        for step, graph, ring in zip(self.steps, self._graphs, state.rings, strict=True):
            rolled = stream.sink_distance if distance is None else distance(state.blocks, step)
            position = rope.sink_position(first, rolled)
            outputs = graph.run(
                {
                    "latent": latent,
                    **audio,
                    "block_phase": block_phase,
                    "sink_phase": rope.time_phase(np.array([position]), head_dim),
                    **state.sink,
                    **ring.history(),
                }
            )
            ring.append(outputs)
            latent = self._schedule.euler(step - 1, latent, outputs["velocity"])
        state.blocks += 1
        return latent


def all_steps(steps: int) -> range:
    """The steps of a schedule of so many."""
    return range(1, steps + 1)


def one_step(step: int) -> range:
    """One step alone."""
    return range(step, step + 1)
