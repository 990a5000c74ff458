"""Stages that take turns, as if they shared one processor: a lock between their processes, held while one works.

A measuring aid, like the stage-time floor. Knows files; knows no stage and no Triton.
"""

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
    """What the environment says of it."""
    return ",".join([str(path), *stages])


def turn_of(stage: str, value: str | None) -> Callable[[], AbstractContextManager[None]]:
    """What the stage works in, of a `turns_value`; of no value, or for another stage, there is no wait."""
    path, *stages = (value or "").split(",")
    return partial(_held, Path(path)) if stage in stages else nullcontext
