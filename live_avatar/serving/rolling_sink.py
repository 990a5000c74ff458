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

    def put(self, session: int, latent: Array) -> None: ...

    def fail(self, session: int) -> None: ...

    def take(self, session: int) -> tuple[str, Array]: ...


class RollingSink:
    """Latents waiting to be taken, and sessions known to have failed."""

    def __init__(self, idle_limit_s: float) -> None:
        self._sinks: SessionTable[tuple[str, Array]] = SessionTable(idle_limit_s)

    def put(self, session: int, latent: Array) -> None:
        self._sinks.open(session, lambda: (READY, latent))

    def fail(self, session: int) -> None:
        self._sinks.open(session, lambda: (FAILED, NOTHING))

    def take(self, session: int) -> tuple[str, Array]:
        """(state, latent [1, 16, 1, h, w]); a latent is given once."""
        if session not in self._sinks:
            return ABSENT, NOTHING
        taken = self._sinks.get(session)
        self._sinks.close(session)
        return taken

    def sweep(self, keep: int | None = None) -> None:
        self._sinks.sweep(keep)

    def forgive(self, seconds: float) -> None:
        """Every call is short."""

    def lose(self) -> None:
        self._sinks.clear()

    def handle(self, request: StageRequest) -> StageResponse:
        """The three operations as one Triton model."""
        operation = bytes(request.inputs[OPERATION].reshape(-1)[0]).decode()
        session = int(request.inputs[SESSION][0])
        state, latent = ABSENT, NOTHING
        if operation == PUT:
            self.put(session, request.inputs[LATENT].copy())
        elif operation == FAIL:
            self.fail(session)
        elif operation == TAKE:
            state, latent = self.take(session)
        else:
            raise InputError(f"operation {operation!r} is not one of {PUT}, {TAKE}, {FAIL}.")
        return StageResponse({STATE: text_tensor(state), LATENT: latent})
