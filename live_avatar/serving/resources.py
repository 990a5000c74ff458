"""Resources that sessions of a stage share: results for known avatars, and memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from live_avatar.errors import CapacityError
from live_avatar.graphs.memory import readable
from live_avatar.pipeline.lru import LRU
from live_avatar.runtime import Runtime
from live_avatar.serving.metrics import AVATAR_HITS, AVATAR_MISSES, AVATARS, Meter

T = TypeVar("T")


class KnownAvatars(Generic[T]):
    """A stage's results for the latest avatars. Sessions share them, so they must not be changed."""

    def __init__(self, capacity: int, meter: Meter) -> None:
        self._made: LRU[T] = LRU(capacity)
        self._meter = meter
        meter.declare(AVATAR_HITS)
        meter.declare(AVATAR_MISSES)
        meter.set(AVATARS, 0)  # also after a restart of the process

    def get(self, key: bytes, make: Callable[[], T]) -> T:
        known = key in self._made
        value = self._made.get(key, make)
        self._meter.add(AVATAR_HITS if known else AVATAR_MISSES)
        self._meter.set(AVATARS, len(self._made))
        return value


class SessionRoom:
    """Whether a stage's memory has room for one more session, which takes `needed` bytes."""

    def __init__(self, stage: str, runtime: Runtime, needed: int) -> None:
        self._stage = stage
        self._runtime = runtime
        self._needed = needed

    def holds(self, sessions: int) -> bool:
        """Whether there is room for `sessions` more sessions."""
        return self._runtime.free_bytes() >= sessions * self._needed

    def require(self) -> None:
        """Raises `CapacityError` if there is no room for one more session."""
        free = self._runtime.free_bytes()
        if free < self._needed:
            raise CapacityError(
                f"stage {self._stage} has {readable(free)} of memory free, and a session takes "
                f"{readable(self._needed)} there; try again later or elsewhere."
            )
