"""Ctrl-C and its kin, for the command line: the first one unwinds, and further ones do not disturb the cleaning up."""

from __future__ import annotations

import atexit
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_received: int | None = None


def install() -> None:
    """From now on Ctrl-C, SIGTERM and a closed terminal (unless under nohup) raise KeyboardInterrupt, once."""
    global _received
    _received = None
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)


def ignore() -> None:
    """From now on none of them does anything.

    Python would report of a signal that has just come that it is "ignored due to race condition", so it first gets a
    handler in Python.
    """
    for number in SIGNALS:
        _silence(number)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def deferred() -> Iterator[None]:
    """Defers interruption: inside, the first signal only sets `received`, and further ones are ignored."""
    global _received
    _received = None
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, _note)
    try:
        yield
    finally:
        if _received is None:
            for number, handler in before.items():
                signal.signal(number, handler)


def received() -> bool:
    """Whether a signal has come."""
    return _received is not None


def check() -> None:
    """Raises KeyboardInterrupt if a signal has come: PyAV, interrupted while it encodes, swallows the exception."""
    if _received is not None:
        raise KeyboardInterrupt


def is_termination() -> bool:
    """Whether the signal was SIGTERM, with which an orchestrator asks for an orderly end."""
    return _received == signal.SIGTERM


def _note(number: int, frame: object) -> None:
    """Notes the first signal; further ones do nothing.

    Python drops its own handlers before the process ends, so `ignore` follows.
    """
    global _received
    _received = number
    for other in SIGNALS:
        _silence(other)
    atexit.register(ignore)


def _silence(number: int) -> None:
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, _do_nothing)


def _do_nothing(number: int, frame: object) -> None:
    pass


def _interrupt(number: int, frame: object) -> NoReturn:
    _note(number, frame)
    raise KeyboardInterrupt
