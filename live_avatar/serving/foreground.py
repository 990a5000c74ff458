"""Keeps a server in the foreground of a command until a signal ends it."""

from __future__ import annotations

import time
from collections.abc import Callable

from live_avatar import interrupts
from live_avatar.errors import ServerError
from live_avatar.serving.server import TritonServer

POLL_S = 0.2


def run_until_signal(server: TritonServer, drain_seconds: float, report: Callable[[str], object]) -> None:
    """Returns when SIGTERM has drained the server; Ctrl-C, or a second signal, raises KeyboardInterrupt.

    Raises `ServerError` if the server ends by itself.
    """
    try:
        while server.is_running():
            time.sleep(POLL_S)
        raise ServerError(f"Triton ended by itself with code {server.process.returncode}:\n{server.errors()}")
    except KeyboardInterrupt:
        if not interrupts.is_termination():
            raise
        interrupts.install()
        report(f"Draining: no new sessions; live sessions have {drain_seconds:g} s to finish.")
        ended = server.drain(drain_seconds)
        interrupts.ignore()
        report("All sessions have ended." if ended else "Time is up; the remaining sessions were told to reconnect.")
