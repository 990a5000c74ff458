"""The released 14B state dicts: names and shapes of every tensor."""

from __future__ import annotations

from pathlib import Path

PARAMETERS_14B = Path(__file__).parents[1] / "data" / "parameters_14b.txt"


def released_parameters(network: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released state dict."""
    listed: dict[str, tuple[int, ...]] = {}
    for line in PARAMETERS_14B.read_text().splitlines():
        part, name, shape, copies = line.split() if not line.startswith("#") else ("", "", "", "0")
        if part == network:
            for i in range(int(copies)):
                listed[name.replace("{i}", str(i))] = tuple(map(int, shape.split(",")))
    return listed
