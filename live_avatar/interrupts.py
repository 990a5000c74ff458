"""Ctrl-C and its kin, for the command line: the first one unwinds, and further ones do not disturb the cleaning up.

Knows signals only.
"""

from __future__ import annotations

import signal
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_come: int | None = None


def catch() -> None:
    """From now on Ctrl-C, SIGTERM and a closed terminal (unless under nohup) raise KeyboardInterrupt, once."""
    global _come
    _come = None
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)


def ignore() -> None:
    """From now on none of them does anything."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def check() -> None:
    """Raises KeyboardInterrupt if a signal has come: PyAV, interrupted while it encodes, swallows the exception."""
    if _come is not None:
        raise KeyboardInterrupt


def is_termination() -> bool:
    """Whether the signal was SIGTERM, with which an orchestrator asks for an orderly end."""
    return _come == signal.SIGTERM


def _interrupt(number: int, frame: object) -> NoReturn:
    global _come
    _come = number
    ignore()
    raise KeyboardInterrupt
