"""Running a component's graph: one interface, several engines.

A `Runtime` gives graphs by component name; a graph maps named numpy arrays to named numpy arrays. Stages
are written against these two protocols and do not know which engine answers.
"""

from __future__ import annotations

from typing import Protocol

from live_avatar.arrays import Array, Arrays
from live_avatar.config import Preset


class Graph(Protocol):
    def run(self, inputs: Arrays) -> dict[str, Array]:
        """Outputs by name, for inputs by name, as the component's contract says."""
        ...


class Runtime(Protocol):
    preset: Preset

    def graph(self, component: str) -> Graph:
        """The component's graph, ready to run. Loading may take long; keep what you get."""
        ...
