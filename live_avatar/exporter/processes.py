"""Processes that share the work of an export."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from live_avatar.errors import ExportError


def possible_processes(wanted: int) -> int:
    """`wanted`, or as many as there are processors. 1 where the system gives no semaphores, as in sandboxes without a
    writable /dev/shm."""
    try:
        multiprocessing.get_context("spawn").Lock()
    except (ImportError, OSError):
        return 1
    return min(wanted, len(os.sched_getaffinity(0)))


@contextmanager
def worker_processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of new interpreters. If the block ends by an error or Ctrl-C, they end without finishing their work.

    They are not forked: threads of torch's libraries do not survive that. Raises `ExportError` if one of them dies.
    """
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _prepare_worker)
    try:
        _start(pool, count)
        yield pool
    except BrokenProcessPool as error:
        raise ExportError(
            f"one of the {count} processes of the export has died, perhaps for want of memory; free some, and export "
            "again."
        ) from error
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start(pool: ProcessPoolExecutor, count: int) -> None:
    """Starts the processes with SIGINT blocked, which they inherit: Ctrl-C is the parent's to handle, and would print a
    traceback of one that is still importing."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for _ in range(count):
            pool.submit(int)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepare_worker() -> None:
    """SIGTERM interrupts the work; a process that it killed could not give its semaphores back, and Python would report
    them. Then imports what takes seconds, while the parent prepares the work."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
    importlib.import_module("torch.onnx")
