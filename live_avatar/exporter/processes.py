"""A second process that shares the work of an export."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

from live_avatar.errors import ExportError

Job = TypeVar("Job")


def can_have_helper() -> bool:
    """Whether there is a processor for a second process, and the system gives semaphores: sandboxes without a writable
    /dev/shm do not."""
    try:
        multiprocessing.get_context("spawn").Lock()
    except (ImportError, OSError):
        return False
    return len(os.sched_getaffinity(0)) > 1


@contextmanager
def helper_process() -> Iterator[ProcessPoolExecutor]:
    """A new interpreter that does one job after the other. If the block ends by an error or Ctrl-C, it ends without
    finishing its work.

    It is not forked: threads of torch's libraries do not survive that. Raises `ExportError` if it dies.
    """
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _prepare)
    try:
        _start(pool)
        yield pool
    except BrokenProcessPool as error:
        raise ExportError(
            "one of the 2 processes of the export has died, perhaps for want of memory; free some, and export again."
        ) from error
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start(pool: ProcessPoolExecutor) -> None:
    """Starts the process with SIGINT blocked, which it inherits: Ctrl-C is the parent's to handle, and would print a
    traceback of one that is still importing."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        pool.submit(int)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepare() -> None:
    """Imports what takes seconds, while the parent does the same. From then on SIGTERM interrupts the work: a process
    that it killed could not give its semaphores back, and Python would report them."""
    importlib.import_module("torch.onnx")
    importlib.import_module("live_avatar.exporter.build")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))


def shared(jobs: Sequence[Job], helper: Executor, work: Callable[[Job], object]) -> Iterator[Job]:
    """Does the jobs, the first ones here and the last ones in the helper, and yields each once it is done.

    What `work` raises in the helper is raised here, once no job is left.
    """
    left: deque[Job] = deque(jobs)
    of_helper: SimpleQueue[tuple[Job, Future[object]]] = SimpleQueue()

    def submit_next() -> None:
        with suppress(IndexError):
            job = left.pop()
            try:
                future = helper.submit(work, job)
            except RuntimeError as error:  # the helper has died
                future = Future()
                future.set_exception(error)
            future.add_done_callback(partial(finished, job))

    def finished(job: Job, future: Future[object]) -> None:
        of_helper.put((job, future))
        if not future.cancelled() and future.exception() is None:
            submit_next()

    submit_next()
    for _ in jobs:
        try:
            job = left.popleft()
        except IndexError:
            job, future = of_helper.get()
            future.result()
        else:
            work(job)
        yield job
