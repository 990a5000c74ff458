"""Running a component's graph: one interface, several engines.

A `Runtime` gives graphs by component name; a graph maps named numpy arrays to named numpy arrays. Stages
are written against these two protocols and do not know which engine answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from live_avatar.config import Preset

Arrays = Mapping[str, np.ndarray]


class Graph(Protocol):
    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Outputs by name, for inputs by name, as the component's contract says."""
        ...


class Runtime(Protocol):
    preset: Preset

    def graph(self, component: str) -> Graph:
        """The component's graph, ready to run. Loading may take long; keep what you get."""
        ...
