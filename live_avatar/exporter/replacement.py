"""A folder that takes the place of an old one when it is complete, and not before.

The new folder is made beside the old one, which is kept until the new one stands in its place. An export that was
killed is cleaned up by the next one to the same folder.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from live_avatar.errors import ExportError


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """Gives an empty folder that takes the place of `output` afterwards; after an exception `output` is as before.

    Raises `ExportError`, before anything is done, if `output` cannot be replaced or another export writes there.
    """
    _refuse_links(output)
    key = hashlib.sha256(os.fsencode(output.name)).hexdigest()[:12]  # the name itself may be as long as names can be
    work = output.parent / f".export-{key}"
    output.parent.mkdir(parents=True, exist_ok=True)
    with _locked(work.with_suffix(".lock"), output):
        _tidy(work, output)
        new = work / "new"
        new.mkdir(parents=True)
        try:
            _check_movable(output, work)
            yield new
            if output.exists():
                output.rename(_old(work))
            new.rename(output)
        finally:
            _tidy(work, output)


def _refuse_links(output: Path) -> None:
    if output.is_symlink():
        raise ExportError(
            f"{output} is a symbolic link, which new artifacts would replace; give the folder that it leads to, "
            f"--output {os.path.realpath(output)}."
        )
    if Path.cwd().is_relative_to(output.resolve()):
        raise ExportError(
            f"{output} is or contains the working directory, which cannot be replaced; choose another --output, such "
            f"as {output / 'artifacts'}."
        )


def _check_movable(output: Path, work: Path) -> None:
    """Tries a move that cannot succeed, because `work` is not empty, and looks at the reason."""
    if not output.exists():
        return
    try:
        output.rename(work)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return
        fault = "is a mount point" if error.errno == errno.EBUSY else f"cannot be moved ({error.strerror})"
        raise ExportError(
            f"{output} {fault}, so that new artifacts cannot take its place; choose another --output, such as "
            f"{output / 'artifacts'}."
        ) from error


def _old(work: Path) -> Path:
    return work / "old"


def _tidy(work: Path, output: Path) -> None:
    """Puts the old folder back if nothing took its place, and removes everything else."""
    if _old(work).exists() and not output.exists():
        try:
            _old(work).rename(output)
        except OSError as error:
            raise ExportError(
                f"{output} could not be put back ({error.strerror}); it is in {_old(work)}: move it from there."
            ) from error
    if work.exists():
        shutil.rmtree(work)


@contextmanager
def _locked(path: Path, output: Path) -> Iterator[None]:
    """Raises `ExportError` if another process is in here. The file goes with the lock, which ends with its process."""
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ExportError(
                    f"another export writes to {output}; wait until it has ended, or choose another --output."
                ) from error
            except OSError as error:
                raise ExportError(f"{path} cannot be locked ({error.strerror}); choose another --output.") from error
            if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
                continue  # the last holder has removed it since it was opened
            try:
                yield
            finally:
                path.unlink()
            return
