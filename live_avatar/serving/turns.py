"""A lock between the processes of stages that take turns, as if they shared one processor. For measurements only."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path


@contextmanager
def _held(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        yield


def turns_value(path: Path, stages: tuple[str, ...]) -> str:
    """The value of the environment variable."""
    return ",".join([str(path), *stages])


def turn_of(stage: str, value: str | None) -> Callable[[], AbstractContextManager[None]]:
    """The context in which a stage processes requests: the lock if `value` (a `turns_value`) names it, else none."""
    path, *stages = (value or "").split(",")
    return partial(_held, Path(path)) if stage in stages else nullcontext
