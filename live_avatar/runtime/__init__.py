"""Running a component's graph: one interface, several engines.

A `Runtime` gives graphs by component name; a graph maps named arrays to named arrays. Stages are written against
these protocols and do not know which engine answers. Arrays are numpy's, but for the resident ones of a contract
(caches and states, which a stage only keeps, slices and hands back): those are of the runtime's own kind, and on a
GPU they never leave it.
"""

from __future__ import annotations

from typing import Protocol

from live_avatar.arrays import Array, Arrays
from live_avatar.config import Preset
from live_avatar.inputs.text import Tokenizer


class Graph(Protocol):
    def run(self, inputs: Arrays) -> dict[str, Array]:
        """Outputs by name, for inputs by name, as the component's contract says."""
        ...


class Allocator(Protocol):
    def __call__(self, shape: tuple[int, ...], dtype: str) -> Array:
        """A new resident array of zeros; `dtype` as contracts name it."""
        ...


class Runtime(Protocol):
    preset: Preset
    tokenizer: Tokenizer
    zeros: Allocator

    def free_bytes(self) -> int:
        """Memory that resident arrays could take now."""
        ...

    def modulation(self, step: int) -> dict[str, Array]:
        """`modulation` [layers, 6, C] and `head_modulation` [2, C] of a denoising step counted from 1, resident.

        Those of 0 are for the sink, which is prefilled at timestep 0.
        """
        ...

    def graph(self, component: str) -> Graph:
        """The component's graph, ready to run. Loading may take long; keep what you get."""
        ...
