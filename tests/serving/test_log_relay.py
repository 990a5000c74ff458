"""A log that never blocks: a pipe that nobody reads, one that is closed, and a stream in memory."""

from __future__ import annotations

import io
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from typing import TextIO

import pytest

from live_avatar.serving import LOG_MARK
from live_avatar.serving.log_relay import LogRelay, json_line

LIMIT_S = 120.0
LINE = "x" * 99
LINES = 100


@pytest.fixture
def pipe() -> Iterator[tuple[int, TextIO]]:
    """The reading end's descriptor, and the writing end as a stream."""
    read, write = os.pipe()
    with os.fdopen(write, "w") as stream:
        yield read, stream
    try:
        os.close(read)
    except OSError:  # the test has closed it
        return


def read_until(descriptor: int, text: str) -> str:
    found = ""
    while text not in found:
        found += os.read(descriptor, 1 << 16).decode()
    return found


class Gate(io.StringIO):
    """Holds every write until it is allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Semaphore(0)
        self.allowed = threading.Semaphore(0)

    def write(self, text: str) -> int:
        self.entered.release()
        assert self.allowed.acquire(timeout=LIMIT_S)
        return super().write(text)


def test_lines_come_in_order(pipe: tuple[int, TextIO]) -> None:
    read, stream = pipe
    relay = LogRelay(stream)
    for number in range(LINES):
        relay.write(f"{number} ä")
    assert relay.close(LIMIT_S)
    assert os.read(read, 1 << 16).decode() == "".join(f"{number} ä\n" for number in range(LINES))
    assert relay.dropped == 0


def _told_and_lost(text: str) -> int:
    """Whole lines that came, and those counted as lost; a busy machine counts in several places."""
    counts = re.findall(r"^(\d+) log lines were dropped because nobody read them$", text, re.MULTILINE)
    return text.count(f"{LINE}\n") + sum(map(int, counts))


def test_a_pipe_that_nobody_reads_blocks_nobody_and_the_lost_lines_are_counted(pipe: tuple[int, TextIO]) -> None:
    read, stream = pipe
    relay = LogRelay(stream, max_chars=10_000)
    for _ in range(3000):  # 300 kB: more than the pipe and the queue together
        relay.write(LINE)
    lost = relay.dropped
    assert lost > 1000
    relay.write("again")  # is lost, too, if the queue is still full
    text = read_until(read, "because nobody read them\n")
    while _told_and_lost(text) < 3000:
        text += os.read(read, 1 << 16).decode()
    assert _told_and_lost(text) in (3000, 3001)
    relay.write("last")
    assert read_until(read, "last\n").endswith("last\n")
    lost = relay.dropped
    assert relay.close(LIMIT_S)
    assert relay.dropped == lost


def test_the_count_stands_where_the_lines_were_lost() -> None:
    stream = Gate()
    relay = LogRelay(stream, max_chars=20)
    relay.write("1")
    assert stream.entered.acquire(timeout=LIMIT_S)  # it is out of the queue, which has room for two lines
    for line in ("2" * 9, "3" * 9, "lost", "lost", "lost"):
        relay.write(line)
    stream.allowed.release()
    assert stream.entered.acquire(timeout=LIMIT_S)
    relay.write("4")
    stream.allowed.release(LINES)
    assert relay.close(LIMIT_S)
    lost = "3 log lines were dropped because nobody read them"
    assert stream.getvalue().splitlines() == ["1", "2" * 9, "3" * 9, lost, "4"]


def test_closing_does_not_wait_for_a_reader_longer_than_its_limit(pipe: tuple[int, TextIO]) -> None:
    _, stream = pipe
    relay = LogRelay(stream)
    for _ in range(3000):
        relay.write(LINE)
    start_s = time.monotonic()
    assert not relay.close(0.3)
    assert 0.3 <= time.monotonic() - start_s < LIMIT_S
    relay.write("late")
    assert relay.dropped >= 1


def test_closing_writes_what_is_queued_once_somebody_reads(pipe: tuple[int, TextIO]) -> None:
    read, stream = pipe
    relay = LogRelay(stream)
    for _ in range(3000):
        relay.write(LINE)
    relay.write("last")
    read_until(read, "last\n")
    assert relay.close(LIMIT_S)


def test_a_reader_that_has_gone_stops_nobody(pipe: tuple[int, TextIO]) -> None:
    read, stream = pipe
    os.close(read)
    relay = LogRelay(stream)
    for _ in range(10):
        relay.write(LINE)
    assert not relay.close(LIMIT_S)
    assert relay.dropped == 10


def test_a_stream_in_memory_is_written_as_well() -> None:
    stream = io.StringIO()
    relay = LogRelay(stream)
    relay.write("one")
    relay.write("two")
    assert relay.close(LIMIT_S)
    assert stream.getvalue() == "one\ntwo\n"


def test_each_line_of_a_json_log_is_an_object():
    now = datetime.now().astimezone()
    lines = {
        f"2026-11-29 11:37:12,123{LOG_MARK}session 5 ended": {"message": "session 5 ended"},
        f'2026-11-29 11:37:12,123{LOG_MARK}{{"event": "session ended", "session": 5}}': {
            "event": "session ended",
            "session": 5,
        },
        f"2026-11-29 11:37:12,123{LOG_MARK}[1, 2]": {"message": "[1, 2]"},
        'E1129 14:52:06 18111 manager.cc:703] "Invalid"': {"message": 'E1129 14:52:06 18111 manager.cc:703] "Invalid"'},
        '{"event": "not ours"}': {"message": '{"event": "not ours"}'},
        "": {"message": ""},
    }
    for line, facts in lines.items():
        found = json.loads(json_line(line))
        at = datetime.fromisoformat(found.pop("time"))
        assert found == facts
        assert at.tzinfo is not None
        if line.startswith("2026"):
            assert (at.hour, at.second, at.microsecond) == (11, 12, 123000)
        else:
            assert abs((at - now).total_seconds()) < 3600.0


def test_the_count_of_dropped_lines_has_the_form_of_the_others():
    stream = io.StringIO()
    relay = LogRelay(stream, 10, json_line)
    relay.write("a line that is too long")
    assert relay.close(LIMIT_S)
    assert "1 log line was dropped" in json.loads(stream.getvalue())["message"]
