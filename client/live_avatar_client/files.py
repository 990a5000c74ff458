"""Files of a user: checks of inputs, and outputs that appear complete or not at all."""

import contextlib
import errno
import os
import secrets
import shutil
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeAlias

from .errors import MediaError

Faults: TypeAlias = type[Exception] | tuple[type[Exception], ...]

_MAX_NAME_BYTES: Final = 255


def require_file(path: str | os.PathLike[str], kind: str, wanted: str) -> None:
    """Raise MediaError unless `path` leads to a regular file; `kind` and `wanted` name it in the message."""
    try:
        fault = "" if stat.S_ISREG(os.stat(path).st_mode) else "is not a file"
    except FileNotFoundError:
        fault = "does not exist"
    except OSError as error:
        fault = f"cannot be read: {error.strerror}"
    if fault:
        raise MediaError(f"the {kind} {os.fspath(path)!r} {fault}; pass the path of {wanted}")


class OutputFile:
    """A file that is written as `partial` in the target's folder; `publish` moves it to the target.

    Only `publish` replaces an existing file, and keeps its mode and owner. A symbolic link is kept, and its target is
    replaced. A file that cannot be replaced, such as a mount point, is overwritten in place.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str) -> None:
        self.path = Path(path)
        self._name = f"the {kind} {os.fspath(path)!r}"
        self.target = Path(os.path.realpath(path))
        self.partial = self.target.parent / _partial_name(self.target.name)

    @contextlib.contextmanager
    def explained(self, faults: Faults = OSError) -> Iterator[None]:
        """Raise errors of the file system or a library as MediaError."""
        try:
            yield
        except faults as error:
            reason = getattr(error, "strerror", None) or error
            raise MediaError(
                f"{self._name} cannot be written: {reason}; pass a path in a folder that exists, is writable "
                "and has room"
            ) from error

    def create(self) -> None:
        """Create an empty `partial`; raise MediaError unless it can replace the target."""
        with self.explained():
            is_there = self._is_there()
            self.partial.touch(exist_ok=False)
            if is_there:
                self.partial.chmod(0o600)  # the existing file may be private; `publish` copies its mode

    def _is_there(self) -> bool:
        """Return whether the target exists; raise OSError if it must not be replaced."""
        try:
            mode = self.target.stat().st_mode
        except FileNotFoundError:
            return False
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode):  # never replace a device or a pipe
            raise OSError(errno.EINVAL, "Not a regular file")
        if not os.access(self.target, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
            raise PermissionError(errno.EACCES, "The file there is read-only")
        return True

    def check(self) -> None:
        """Raise MediaError unless the file could be created now."""
        try:
            self.create()
        finally:
            self.discard()

    def publish(self) -> None:
        """Move the partial file to the target."""
        with self.explained():
            try:
                if self.target.exists():
                    _copy_attributes(self.target, self.partial)
                self.partial.replace(self.target)
            except OSError:
                if not self.target.exists():
                    raise
                _overwrite(self.target, self.partial)

    def discard(self) -> None:
        """Remove the partial file, unless it was published."""
        with contextlib.suppress(OSError):  # it may never have been created
            self.partial.unlink()


def _partial_name(name: str) -> str:
    """Return a hidden name that is no longer than a file system allows."""
    tail = f".{secrets.token_hex(4)}.part"
    room = _MAX_NAME_BYTES - 1 - len(tail)
    return f".{os.fsdecode(os.fsencode(name)[:room])}{tail}"


def _copy_attributes(source: Path, target: Path) -> None:
    """Give `target` the owner, the mode and the extended attributes of `source`; its times stay."""
    was = source.stat()
    if (was.st_uid, was.st_gid) != (target.stat().st_uid, target.stat().st_gid):
        os.chown(target, was.st_uid, was.st_gid)
    shutil.copystat(source, target)
    os.utime(target)


def _overwrite(target: Path, source: Path) -> None:
    with source.open("rb") as new, target.open("r+b") as old:
        shutil.copyfileobj(new, old)
        old.truncate()


class FileWriter(ABC):
    """Fills an OutputFile in a `with` statement: published at its normal end, removed after an exception."""

    def __init__(self, file: OutputFile) -> None:
        self._file = file

    def __enter__(self) -> Self:
        try:
            self._file.create()
            self._open()
        except BaseException:
            self._file.discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            self._abandon()
            self._file.discard()

    @abstractmethod
    def _open(self) -> None:
        """Begin the contents; the partial file exists."""

    @abstractmethod
    def _finish(self) -> None:
        """Complete the contents and publish them."""

    @abstractmethod
    def _abandon(self) -> None:
        """Close what `_open` opened, in any state; never raises."""
