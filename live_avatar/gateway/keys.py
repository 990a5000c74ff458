"""API keys of callers, by name, and the file that holds their hashes.

A line of the file is `NAME sha256:HEX`; blank lines and lines that begin with `#` count for nothing. A file may hold
one plain key instead, whose caller is called `default`. No message contains a key or a hash.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from live_avatar.errors import ServerError
from live_avatar.serving.access import read_key

ANONYMOUS: Final = "anonymous"
DEFAULT: Final = "default"
NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
LINE: Final = re.compile(rf"({NAME.pattern})[ \t]+sha256:([0-9a-fA-F]{{64}})")
NAME_RULE: Final = f"1 to 64 of A-Z, a-z, 0-9, '.', '_' and '-', other than {ANONYMOUS}"
LINE_RULE: Final = "NAME sha256:HEX, with 64 hexadecimal digits"
HEADER: Final = "# API keys of callers, a line for each: NAME sha256:HEX. Change it with `live-avatar keys`."
MAX_BYTES: Final = 1 << 20
KEY_BYTES: Final = 32
MODE: Final = 0o600

Version = tuple[int, int, int, int, int]
"""Device, inode, size, and times of a file in ns: it was written if they differ."""


@dataclass(frozen=True)
class KeyFile:
    """What a file holds. lines: its text; names: the number of the line of each name; hashes: SHA-256 by name."""

    lines: Sequence[str]
    names: Mapping[str, int]
    hashes: Mapping[str, bytes]
    version: Version
    plain: bool = False


class KeyRing:
    """The keys in use. Without a file everybody is allowed, and called `anonymous`."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._hashes: Mapping[str, bytes] = {}
        self._version: Version | None = None
        self._fault: str | None = None

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Raises `ServerError` for a file that cannot be used. One with no names in it allows nobody."""
        ring, file = cls(), read_keys(path)
        ring._path, ring._hashes, ring._version = path, file.hashes, file.version
        return ring

    @property
    def names(self) -> frozenset[str]:
        """The callers that have a key."""
        return frozenset(self._hashes)

    def shared_key(self, other: KeyRing) -> str | None:
        """A sentence if a key is in both files; None if not."""
        return self._shared(self._hashes, other)

    def caller(self, key: str | None) -> str | None:
        """The name of the caller with this key; None for a key that is missing or unknown.

        It takes as long for every key, whichever it equals.
        """
        if self._path is None:
            return ANONYMOUS
        given, found = _hash("" if key is None else key), None
        for name, known in self._hashes.items():
            if hmac.compare_digest(given, known):
                found = name
        return None if key is None else found

    def reload_if_changed(self, other: KeyRing | None = None) -> str | None:
        """Reads the file again if it was written since. A file that cannot be used, or that holds a key of `other`,
        leaves the keys as they are, and gives a sentence that says why, once."""
        if self._path is None:
            return None
        version = file_version(self._path)
        if version == self._version:
            return None
        try:
            file = read_keys(self._path)
        except ServerError as error:
            self._version = version
            return self._new_fault(str(error))
        if other is not None and (fault := self._shared(file.hashes, other)) is not None:
            return self._new_fault(fault)  # tried again: the other file may be about to change too
        self._hashes, self._version, self._fault = file.hashes, file.version, None
        return None

    def _new_fault(self, fault: str) -> str | None:
        """The sentence, unless it is the last that was given."""
        is_new, self._fault = fault != self._fault, fault
        return fault if is_new else None

    def _shared(self, hashes: Mapping[str, bytes], other: KeyRing) -> str | None:
        if set(hashes.values()).isdisjoint(other._hashes.values()):
            return None
        return (
            f"{self._path} and {other._path} hold the same key, so that a caller would be an operator; put another key "
            "into one of them."
        )


def add_key(path: Path, name: str) -> str:
    """Gives a new caller a new key, which only its hash stands for in the file; makes the file if there is none.

    Raises `ServerError` for a name that is taken or not allowed, and for a file that cannot be used.
    """
    if not NAME.fullmatch(name) or name == ANONYMOUS:
        raise ServerError(f"{name!r} cannot be a caller's name; expected {NAME_RULE}.")
    with _locked(path):
        lines = [HEADER]
        if path.exists():
            file = _read_names(path)
            if name in file.names:
                raise ServerError(f"{path} has a key of {name} already; choose another name, or remove that key first.")
            lines = list(file.lines)
        key = secrets.token_urlsafe(KEY_BYTES)
        _write(path, [*lines, f"{name} sha256:{_hash(key).hex()}"])
    return key


def remove_key(path: Path, name: str) -> None:
    """Takes a caller's key out of the file. Raises `ServerError` if it is not there."""
    with _locked(path):
        file = _read_names(path)
        if name not in file.names:
            raise ServerError(f"{path} has no key of {name!r}; it has {', '.join(file.names) or 'none'}.")
        lines = [line for number, line in enumerate(file.lines, 1) if number != file.names[name]]
        _write(path, lines if any(line.strip() for line in lines) else [HEADER])


def key_names(path: Path) -> list[str]:
    """The callers in a file, in its order. Raises `ServerError` for a file that cannot be used."""
    return list(read_keys(path).names)


def read_keys(path: Path) -> KeyFile:
    """Raises `ServerError`, with the number of the line, for a file that cannot be used."""
    try:
        with path.open("rb") as file:
            version, data = _version_of(os.fstat(file.fileno())), file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ServerError(
            f"{path}: the keys cannot be read ({error.strerror}); give a file that this user can read."
        ) from error
    if len(data) > MAX_BYTES:
        raise ServerError(f"{path} has more than {MAX_BYTES} bytes, so it is no file of keys; give another one.")
    text = data.decode("utf-8", errors="replace")
    lines = text.splitlines()
    if len(lines) < 2 and not re.search(r"\s", text.strip()):
        return KeyFile(lines, {DEFAULT: 1}, {DEFAULT: _hash(read_key(path))}, version, plain=True)
    return _parsed(path, lines, version)


def _parsed(path: Path, lines: Sequence[str], version: Version) -> KeyFile:
    names: dict[str, int] = {}
    hashes: dict[str, bytes] = {}
    seen: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = LINE.fullmatch(line.strip())
        if found is None or found[1] == ANONYMOUS:
            raise ServerError(
                f"{path}: line {number} is no key; expected {LINE_RULE} and a name of {NAME_RULE}, or a file with one "
                "plain key and nothing else; make lines with `live-avatar keys add`."
            )
        name, known = found[1], bytes.fromhex(found[2])
        if name in names:
            raise ServerError(f"{path}: lines {names[name]} and {number} have the same name; rename or remove one.")
        if known in seen:
            raise ServerError(f"{path}: lines {seen[known]} and {number} have the same key; give each its own.")
        names[name], hashes[name], seen[known] = number, known, number
    return KeyFile(lines, names, hashes, version)


def _read_names(path: Path) -> KeyFile:
    file = read_keys(path)
    if file.plain:
        raise ServerError(
            f"{path} holds one plain key, without a name; give another file, and serve with that one once every caller "
            "has a key of its own."
        )
    return file


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="backslashreplace")).digest()


def file_version(path: Path) -> Version | None:
    """Differs after a file was written; None for a file that is not there."""
    try:
        return _version_of(path.stat())
    except OSError:
        return None


def _version_of(found: os.stat_result) -> Version:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Only one process at a time changes files of keys in the folder."""
    folder = os.open(path.resolve().parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _write(path: Path, lines: Sequence[str]) -> None:
    """Whole or not at all; a file that was there keeps its mode and owner."""
    target = path.resolve()  # a link stays one
    descriptor, partial = tempfile.mkstemp(dir=target.parent, prefix=".keys-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), MODE)
            _as_before(target, file.fileno())
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _as_before(target: Path, descriptor: int) -> None:
    if target.exists():
        found = target.stat()
        with suppress(PermissionError):  # only root may give a file away
            os.fchown(descriptor, found.st_uid, found.st_gid)
        os.fchmod(descriptor, found.st_mode & 0o777)
