"""The one backward edge of the pipe: a session's first clean latent frame goes from the last step to conditioning.

The last step puts the latent frame, conditioning takes it (the broadcast of Algorithm 4). No call waits, except
`SinkReceiver.wait` inside conditioning.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from live_avatar.arrays import Array
from live_avatar.config import LATENT_CHANNELS
from live_avatar.errors import InputError, SessionError
from live_avatar.serving.control import Control
from live_avatar.serving.sessions import SessionTable
from live_avatar.serving.stage import StageRequest, StageResponse
from live_avatar.serving.tensors import LATENT, OPERATION, SESSION, STATE, text_tensor

PUT, TAKE, FAIL = "put", "take", "fail"
READY, ABSENT, FAILED = "ready", "absent", "failed"

NOTHING = np.zeros((0, LATENT_CHANNELS, 1, 1, 1), dtype=np.float32)

POLL_S = 0.002
WAIT_LIMIT_S = 10.0


class SinkClient(Protocol):
    """How a stage reaches the rolling sink."""

    def put(self, key: int, latent: Array) -> None: ...

    def fail(self, key: int) -> None: ...

    def take(self, key: int) -> tuple[str, Array]: ...


@dataclass
class PendingSink:
    """The new sink of one session, as conditioning sees it.

    key: key of this session's entry in the rolling sink; never reused, because a sequence id may be.
    """

    key: int
    reload_epoch: int
    latent: Array | None = None
    has_failed: bool = False
    was_sent: bool = False


class SinkReceiver:
    """Fetches the new sinks for conditioning."""

    def __init__(
        self,
        sinks: SinkClient,
        control: Control,
        sleep: Callable[[float], None] = time.sleep,
        wait_limit_s: float = WAIT_LIMIT_S,
    ) -> None:
        self._sinks = sinks
        self._control = control
        self._sleep = sleep
        self._wait_limit_s = wait_limit_s

    def pending(self, key: int) -> PendingSink:
        """A sink that has not been made yet."""
        return PendingSink(key, self._control.reload_epoch)

    def fetch(self, sink: PendingSink) -> None:
        """Takes the new sink if it is ready. Call it early: the rolling sink drops it after its idle limit, but a
        session may pause for any time."""
        if sink.latent is None:
            state, latent = self._sinks.take(sink.key)
            if state == READY:
                sink.latent = latent
            elif state == FAILED:
                sink.has_failed = True

    def wait(self, session: int, sink: PendingSink) -> float:
        """Waits until the new sink is there; returns the seconds. Block 1, which makes it, is ahead in the pipe."""
        begun_s = time.monotonic()
        deadline_s = begun_s + self._wait_limit_s
        while sink.latent is None:
            if sink.has_failed:
                raise SessionError(f"session {session} has failed in a later stage; end it and start a new one.")
            if time.monotonic() >= deadline_s or self._control.reload_epoch != sink.reload_epoch:
                raise SessionError(
                    f"session {session}: block 1 gave no new sink within {self._wait_limit_s:g} s, or was lost with a "
                    "stage that had to be loaded again; end it and start a new one."
                )
            self._sleep(POLL_S)
            self.fetch(sink)
        return time.monotonic() - begun_s


class RollingSink:
    """Latents that wait for conditioning, and marks of sessions that have failed."""

    def __init__(self, idle_limit_s: float) -> None:
        self._sinks: SessionTable[tuple[str, Array]] = SessionTable(idle_limit_s)

    def put(self, key: int, latent: Array) -> None:
        self._sinks.open(key, lambda: (READY, latent))

    def fail(self, key: int) -> None:
        self._sinks.open(key, lambda: (FAILED, NOTHING))

    def take(self, key: int) -> tuple[str, Array]:
        """(state, latent [1, 16, 1, h, w]); a latent is returned once."""
        if key not in self._sinks:
            return ABSENT, NOTHING
        taken = self._sinks.get(key)
        self._sinks.close(key)
        return taken

    def sweep(self, keep: int | None = None) -> None:
        self._sinks.sweep(keep)

    def extend_idle(self, seconds: float) -> None:
        """Does nothing: every call is short."""

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
