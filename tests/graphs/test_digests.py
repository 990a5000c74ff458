"""Digests of files: in pieces, and each file once in a process."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from live_avatar.graphs import digests
from live_avatar.graphs.digests import file_digests, file_sha256


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pieces of 4 KiB, read 1 KiB at a time; gives the starts of the pieces that were hashed."""
    hashed: list[int] = []
    hash_piece = digests._piece_sha256

    def recorded(descriptor: int, start: int) -> bytes:
        hashed.append(start)
        return hash_piece(descriptor, start)

    monkeypatch.setattr(digests, "PIECE_BYTES", 4096)
    monkeypatch.setattr(digests, "BUFFER_BYTES", 1000)
    monkeypatch.setattr(digests, "_piece_sha256", recorded)
    return hashed


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 4095, 4096])
def test_the_digest_of_one_piece_is_its_sha256(tmp_path: Path, pieces: list[int], size: int) -> None:
    path = written(tmp_path / "file", os.urandom(size))
    assert file_digests([path]) == {path: file_sha256(path)}
    assert pieces == [0]


@pytest.mark.parametrize("size", [4097, 8192, 10_000])
def test_the_digest_of_many_pieces_is_the_sha256_of_theirs(tmp_path: Path, pieces: list[int], size: int) -> None:
    data = os.urandom(size)
    path = written(tmp_path / "file", data)
    parts = [hashlib.sha256(data[start : start + 4096]).digest() for start in range(0, size, 4096)]
    assert file_digests([path]) == {path: hashlib.sha256(b"".join(parts)).hexdigest()}
    assert sorted(pieces) == list(range(0, size, 4096))


def test_a_file_is_hashed_once(tmp_path: Path, pieces: list[int]) -> None:
    path = written(tmp_path / "file", b"1234")
    assert file_digests([path]) == file_digests([path])
    assert pieces == [0]


def test_a_changed_file_is_hashed_again_even_if_its_time_is_set_back(tmp_path: Path, pieces: list[int]) -> None:
    path = written(tmp_path / "file", b"1234")
    before, times = file_digests([path]), path.stat()
    written(path, b"4321")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_mtime_ns == times.st_mtime_ns
    assert file_digests([path]) != before
    assert pieces == [0, 0]


def test_a_file_that_is_written_while_it_is_hashed_is_refused(
    tmp_path: Path, pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "file", b"1234")
    hash_piece = digests._piece_sha256

    def written_meanwhile(descriptor: int, start: int) -> bytes:
        digest = hash_piece(descriptor, start)
        written(path, b"12345")
        return digest

    monkeypatch.setattr(digests, "_piece_sha256", written_meanwhile)
    with pytest.raises(OSError, match="file was written while it was read"):
        file_digests([path])


def test_a_file_that_is_linked_while_it_is_hashed_is_read(
    tmp_path: Path, pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a backup does; the digest is not kept, for the time of change would also hide a write."""
    path = written(tmp_path / "file", b"1234")
    hash_piece = digests._piece_sha256

    def linked_meanwhile(descriptor: int, start: int) -> bytes:
        digest = hash_piece(descriptor, start)
        os.link(path, tmp_path / f"link {len(pieces)}")
        return digest

    monkeypatch.setattr(digests, "_piece_sha256", linked_meanwhile)
    assert file_digests([path]) == {path: hashlib.sha256(b"1234").hexdigest()}
    monkeypatch.setattr(digests, "_piece_sha256", hash_piece)
    assert file_digests([path]) == {path: hashlib.sha256(b"1234").hexdigest()}
    assert pieces == [0, 0]
