"""What is remembered, and what goes first."""

from __future__ import annotations

import pytest

from live_avatar.pipeline.lru import LRU


def made(lru: LRU[str], *keys: str) -> list[str]:
    """The keys whose values had to be made."""
    asked: list[str] = []

    def make(key: str) -> str:
        asked.append(key)
        return key.upper()

    assert [lru.get(key.encode(), lambda key=key: make(key)) for key in keys] == [key.upper() for key in keys]
    return asked


def test_the_longest_unused_goes_first() -> None:
    lru: LRU[str] = LRU(2)
    assert made(lru, "a", "b", "a") == ["a", "b"]
    assert made(lru, "c") == ["c"], "b was unused for longest"
    assert made(lru, "a", "b") == ["b"]
    assert (b"b" in lru, b"c" in lru, len(lru)) == (True, False, 2)


def test_without_room_nothing_is_kept() -> None:
    assert made(LRU(0), "a", "a") == ["a", "a"]


def test_a_value_that_could_not_be_made_is_not_remembered() -> None:
    lru: LRU[str] = LRU(2)

    def fail() -> str:
        raise ValueError("no such picture")

    with pytest.raises(ValueError, match="no such picture"):
        lru.get(b"a", fail)
    assert made(lru, "a") == ["a"]
