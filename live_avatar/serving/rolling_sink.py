"""The one backward edge: the last step puts a session's first clean latent frame, conditioning takes it.

The pipeline is a chain but for this (Algorithm 4's broadcast). Knows latents by session; calls never wait.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from live_avatar.arrays import Array
from live_avatar.config import LATENT_CHANNELS
from live_avatar.errors import InputError
from live_avatar.serving.stage import SessionTable, StageRequest, StageResponse
from live_avatar.serving.tensors import LATENT, OPERATION, SESSION, STATE, text_tensor

PUT, TAKE, FAIL = "put", "take", "fail"
READY, ABSENT, FAILED = "ready", "absent", "failed"

NOTHING = np.zeros((0, LATENT_CHANNELS, 1, 1, 1), dtype=np.float32)


class SinkClient(Protocol):
    """How a stage reaches the rolling sink."""

    def put(self, key: int, latent: Array) -> None: ...

    def fail(self, key: int) -> None: ...

    def take(self, key: int) -> tuple[str, Array]: ...


class RollingSink:
    """Latents waiting to be taken, and sessions known to have failed."""

    def __init__(self, idle_limit_s: float) -> None:
        self._sinks: SessionTable[tuple[str, Array]] = SessionTable(idle_limit_s)

    def put(self, key: int, latent: Array) -> None:
        self._sinks.open(key, lambda: (READY, latent))

    def fail(self, key: int) -> None:
        self._sinks.open(key, lambda: (FAILED, NOTHING))

    def take(self, key: int) -> tuple[str, Array]:
        """(state, latent [1, 16, 1, h, w]); a latent is given once."""
        if key not in self._sinks:
            return ABSENT, NOTHING
        taken = self._sinks.get(key)
        self._sinks.close(key)
        return taken

    def sweep(self, keep: int | None = None) -> None:
        self._sinks.sweep(keep)

    def extend_idle(self, seconds: float) -> None:
        """Every call is short."""

    def drop_all(self) -> None:
        self._sinks.clear()

    def handle(self, request: StageRequest) -> StageResponse:
        """The three operations as one Triton model."""
        operation = bytes(request.inputs[OPERATION].reshape(-1)[0]).decode()
        key = int(request.inputs[SESSION][0])
        state, latent = ABSENT, NOTHING
        if operation == PUT:
            self.put(key, request.inputs[LATENT].copy())
        elif operation == FAIL:
            self.fail(key)
        elif operation == TAKE:
            state, latent = self.take(key)
        else:
            raise InputError(f"operation {operation!r} is not one of {PUT}, {TAKE}, {FAIL}.")
        return StageResponse({STATE: text_tensor(state), LATENT: latent})
