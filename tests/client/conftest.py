"""What holds for every test of the client: it leaves no thread behind."""

import threading
import time
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = _threads()
    yield
    deadline_s = time.monotonic() + 60
    while (left := _threads() - before) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not left


def _threads() -> set[threading.Thread]:
    """All threads but the one with which grpc polls for asyncio; it outlives the channels a little."""
    return {thread for thread in threading.enumerate() if "_poll_wrapper" not in thread.name}
