"""Digests of files. They show that a file was changed before it is used.

Large files are hashed in pieces by several threads. A file whose digest is known is not hashed again in this process
as long as its inode, size and times stay the same.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO

PIECE_BYTES = 64 << 20
BUFFER_BYTES = 1 << 20
THREADS = min(4, os.cpu_count() or 1)
"""More would take processors from live sessions when a stage comes back."""

Identity = tuple[int, int, int, int, int]
"""Device, inode, size, time of modification and of change in ns. The last one cannot be set by a program."""

_known: dict[Identity, str] = {}
_lock = threading.Lock()


def file_sha256(path: Path) -> str:
    """The SHA-256 that `sha256sum` prints."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digests(paths: Iterable[Path]) -> dict[Path, str]:
    """Digests by path: the SHA-256 of a file of one piece, and that of the pieces' SHA-256 of a larger one.

    The files are hashed in parallel. Raises `OSError` for a file that cannot be read, or that is written meanwhile.
    """
    paths = list(paths)
    with ThreadPoolExecutor(THREADS) as files, ThreadPoolExecutor(THREADS) as pieces:
        return dict(zip(paths, files.map(partial(_digest, pieces), paths), strict=True))


def _digest(pool: ThreadPoolExecutor, path: Path) -> str:
    with path.open("rb") as file:
        identity = _identity(file)
        with _lock:
            known = _known.get(identity)
        if known is None:
            size = identity[2]
            pieces = list(pool.map(partial(_piece_sha256, file.fileno()), range(0, max(size, 1), PIECE_BYTES)))
            known = (pieces[0] if len(pieces) == 1 else hashlib.sha256(b"".join(pieces)).digest()).hex()
            after = _identity(file)
            if _content(after) != _content(identity):
                raise OSError(f"{path} was written while it was read")
            if after == identity:
                with _lock:
                    _known[identity] = known
        return known


def _identity(file: BinaryIO) -> Identity:
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _content(identity: Identity) -> Identity:
    """Without the time of change: a new hard link, owner or name changes that one too, as a backup does."""
    return *identity[:4], 0


def _piece_sha256(descriptor: int, start: int) -> bytes:
    """Reads into one buffer; reading and hashing let other threads run."""
    digest, buffer, end = hashlib.sha256(), memoryview(bytearray(BUFFER_BYTES)), start + PIECE_BYTES
    while start < end and (read := os.preadv(descriptor, [buffer[: end - start]], start)):
        digest.update(buffer[:read])
        start += read
    return digest.digest()
