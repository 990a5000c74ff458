"""Ctrl-C and its kin, for the command line: the first one unwinds, and further ones do not disturb the cleaning up.

Knows signals only.
"""

from __future__ import annotations

import signal
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_come = False


def catch() -> None:
    """From now on Ctrl-C, SIGTERM and a closed terminal (unless under nohup) raise KeyboardInterrupt, once."""
    global _come
    _come = False
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)


def check() -> None:
    """Raises KeyboardInterrupt if a signal has come: PyAV, interrupted while it encodes, swallows the exception."""
    if _come:
        raise KeyboardInterrupt


def _interrupt(number: int, frame: object) -> NoReturn:
    global _come
    _come = True
    for ignored in SIGNALS:
        signal.signal(ignored, signal.SIG_IGN)
    raise KeyboardInterrupt
