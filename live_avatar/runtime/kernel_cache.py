"""Kernels that TensorRT-RTX finishes on this machine's GPU, kept in a file between starts.

The library checks by itself whether a cache is of this version, GPU and driver, and takes none that is not.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from live_avatar.graphs.artifacts import Artifacts
from live_avatar.graphs.engines import Engine, engine_path, write_whole


def cache_places(artifacts: Artifacts, component: str, engine: Engine) -> list[Path]:
    """Files that may hold an engine's kernels, the best first: beside it, or in the user's cache folder.

    The engines of a pod are often on a volume that is read-only for it.
    """
    places = [engine_path(artifacts, component).with_suffix(".kernels")]
    with suppress(RuntimeError):  # a user without a home folder
        home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
        places.append(Path(home) / "live-avatar" / "kernels" / engine.digest)
    return places


class KernelCache:
    """The runtime cache of one engine: taken from the first place that has one that fits, kept in the first that can be
    written."""

    def __init__(self, config: Any, places: Sequence[Path]) -> None:
        """config: TensorRT-RTX's `IRuntimeConfig`, which uses the cache from now on. A CUDA context must exist."""
        self._cache = config.create_runtime_cache()
        self._places = places
        self._kept = b""
        for place in places:
            with suppress(OSError):
                stored = place.read_bytes()
                if self._cache.deserialize(stored):
                    self._kept = _digest(stored)
                    break
        config.set_runtime_cache(self._cache)

    def keep(self) -> None:
        """Writes the cache if it has grown. Where nothing can be written, the next start finishes the kernels again."""
        made = self._cache.serialize()
        digest = _digest(made)
        if digest == self._kept:
            return
        for place in self._places:
            with suppress(OSError):
                place.parent.mkdir(parents=True, exist_ok=True)
                write_whole(place, made)
                break
        self._kept = digest


def _digest(data: Any) -> bytes:
    return hashlib.sha256(data).digest()
