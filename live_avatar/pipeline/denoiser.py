"""One denoising step with its caches: what one GPU of the pipeline does to every block.

`DenoisingStep` holds the graphs of its step; a session's `StepState` holds the ring and the prefilled sink.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from live_avatar.arrays import Array
from live_avatar.graphs.contract import step_name
from live_avatar.model import rope
from live_avatar.model.schedule import make_schedule
from live_avatar.pipeline.kv_cache import KVRing
from live_avatar.pipeline.sink import SinkSource
from live_avatar.runtime import Runtime


@dataclass
class StepState:
    """Caches of one session at one step; `sink` has the prefill's outputs by name, and may be shared: it is replaced,
    never written."""

    ring: KVRing
    sink: dict[str, Array]
    blocks: int = 0


class DenoisingStep:
    """Step `step` (counted from 1) of the schedule."""

    def __init__(self, runtime: Runtime, step: int) -> None:
        self.preset = runtime.preset
        self.step = step
        self._zeros = runtime.zeros
        self._schedule = make_schedule(self.preset.stream)
        self._graph = runtime.graph(step_name(step))
        self._prefill = runtime.graph("dit_prefill")

    def prefill(self, source: SinkSource) -> dict[str, Array]:
        """Text and sink keys and values of a sink, to be given to `open` or put into a state."""
        inputs = {"reference": source.reference, "motion": source.motion, "text": source.text}
        return self._prefill.run(inputs)

    def open(self, sink: dict[str, Array]) -> StepState:
        """State of a new session, from what `prefill` gave."""
        return StepState(KVRing(self.preset, self._zeros), sink)

    def run(self, state: StepState, latent: Array, audio: dict[str, Array], distance: int | None = None) -> Array:
        """Moves the session's next block [1, 16, F, h, w] one noise level down and writes its ring.

        `distance` overrides the preset's rolling distance of the sink.
        """
        stream, head_dim = self.preset.stream, self.preset.dit.head_dim
        first = state.blocks * stream.frames_per_block
        position = rope.sink_position(first, stream.sink_distance if distance is None else distance)
        outputs = self._graph.run(
            {
                "latent": latent,
                **audio,
                "block_phase": rope.time_phase(np.arange(first, first + stream.frames_per_block), head_dim),
                "sink_phase": rope.time_phase(np.array([position]), head_dim),
                **state.sink,
                **state.ring.history(),
            }
        )
        state.ring.append(outputs)
        state.blocks += 1
        return self._schedule.euler(self.step - 1, latent, outputs["velocity"])
