"""Writes shards clip by clip, so that a kill at any moment costs at most the clip that was being written.

A part of a data set is a folder. The open shard has the ending `.partial` and a journal of its clips with their
digests; a process that starts again keeps what the journal describes and cuts off the rest. A full shard is renamed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from training.errors import TrainingError
from training.shards import MAKE

BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)
PARTIAL = ".partial"


class ShardWriter:
    """Appends clips to the shards of a part's folder; goes on where an earlier process ended.

    Every method raises `TrainingError` if the disk is full or the folder cannot be written; what is there stays whole.
    """

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self._number = 0
        self._done: set[str] = set()
        while self._shard.is_file():
            self._done.update(entry["key"] for entry in read_journal(self._journal))
            self._number += 1
        self._recover()

    def __contains__(self, key: str) -> bool:
        return key in self._done

    def __len__(self) -> int:
        return len(self._done)

    @property
    def _shard(self) -> Path:
        return self._folder / f"clips-{self._number:06d}.tar"

    @property
    def _partial(self) -> Path:
        return self._shard.with_name(self._shard.name + PARTIAL)

    @property
    def _journal(self) -> Path:
        return self._shard.with_suffix(".jsonl")

    def add(self, key: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Appends a clip; `facts` come into the index with it."""
        data = save(dict(tensors))
        info = tarfile.TarInfo(f"{key}.safetensors")
        info.size = len(data)
        header = info.tobuf(tarfile.USTAR_FORMAT)
        start = self._partial.stat().st_size if self._partial.exists() else 0
        entry = {
            "key": key,
            "file": f"{self._folder.name}/{self._shard.name}",
            "offset": start + len(header),
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            **facts,
        }
        self._append(self._partial, header + data + bytes(-len(data) % BLOCK))
        self._append(self._journal, (json.dumps(entry) + "\n").encode())
        self._done.add(key)
        if self._partial.stat().st_size >= self._shard_bytes:
            self._close()

    def finish(self) -> None:
        """Closes the last shard."""
        if self._partial.exists():
            self._close()

    def _close(self) -> None:
        self._append(self._partial, END)
        self._partial.replace(self._shard)
        self._number += 1

    def _recover(self) -> None:
        """Cuts the open shard and its journal after the last clip that both have whole."""
        if not self._partial.is_file():
            self._journal.unlink(missing_ok=True)
            return
        kept, end = b"", 0
        with self._partial.open("rb+") as shard:
            for entry in read_journal(self._journal):
                shard.seek(entry["offset"])
                if hashlib.sha256(shard.read(entry["bytes"])).hexdigest() != entry["sha256"]:
                    break
                kept += (json.dumps(entry) + "\n").encode()
                end = entry["offset"] + entry["bytes"] + -entry["bytes"] % BLOCK
                self._done.add(entry["key"])
            shard.truncate(end)
        self._journal.write_bytes(kept)
        if end >= self._shard_bytes:
            self._close()

    def _append(self, path: Path, data: bytes) -> None:
        before = path.stat().st_size if path.exists() else 0
        try:
            with path.open("ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if path.exists():
                os.truncate(path, before)
            full = error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
            remedy = "make room on that disk" if full else "mend that"
            raise TrainingError(
                f"{path} cannot be written ({error.strerror}); the {len(self)} clips before are whole. "
                f"{remedy.capitalize()} and run the same command again: it goes on from there."
            ) from error


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The clips of a shard. A last line that was cut off by a kill is left out."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    entries = []
    for line in lines:
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


def journals(folder: Path) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """The finished shards of a part's folder with their clips. Raises `TrainingError` for one without its journal."""
    for shard in sorted(folder.glob("clips-*.tar")):
        entries = read_journal(shard.with_suffix(".jsonl"))
        if not entries:
            raise TrainingError(f"{shard} has no journal beside it; remove {folder} and {MAKE}.")
        yield shard, entries
