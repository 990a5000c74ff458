"""A log that never blocks those who write to it.

Lines wait in a bounded queue for a thread that writes them to a stream. While nobody reads the stream, lines beyond
the queue are dropped and counted, and the count is written once writing works again.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import select
import threading
from collections import deque
from collections.abc import Callable
from datetime import datetime
from typing import Any, TextIO

from live_avatar.serving import LOG_MARK

MAX_CHARS = 1 << 20
POLL_S = 0.1
PIECE_BYTES = select.PIPE_BUF  # what a pipe takes without blocking once it is ready
MARKED = re.compile(rf"(\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d,\d{{3}}){LOG_MARK}(.*)")
"""A line of the gateway's or of a stage's own."""


class LogRelay:
    """Writes lines to `stream`, whose file descriptor other processes may share. form: makes of a line what is
    written."""

    def __init__(self, stream: TextIO, max_chars: int = MAX_CHARS, form: Callable[[str], str] = str) -> None:
        self._stream = stream
        self._form = form
        self._descriptor = _descriptor(stream)
        self._max_chars = max_chars
        self._queue: deque[str | int] = deque()  # lines, and numbers of lines that were dropped between them
        self._chars = 0
        self._dropped = 0
        self._unreported = 0
        self._works = True
        self._closing = False
        self._abandoned = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._write_all, name="log relay", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Lines that were dropped since the start."""
        return self._dropped

    def write(self, line: str) -> None:
        """Queues a line, given without its end; returns at once."""
        with self._changed:
            if self._closing or self._chars + len(line) + 1 > self._max_chars:
                self._drop(line)
                return
            if self._unreported:
                self._queue.append(self._unreported)
                self._unreported = 0
            self._queue.append(line)
            self._chars += len(line) + 1
            self._changed.notify()

    def handler(self) -> logging.Handler:
        """A handler of Python's logging that writes here."""
        return _RelayHandler(self)

    def close(self, limit_s: float) -> bool:
        """Writes what is queued for at most about `limit_s`; tells whether everything was written or reported.

        Later lines are dropped.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(limit_s)
        self._abandoned = True
        self._thread.join(2 * POLL_S)
        return not (self._thread.is_alive() or self._queue or self._unreported)

    def _drop(self, entry: str | int) -> None:
        """Counts a line, or takes back a number that could not be written."""
        if isinstance(entry, int):
            self._unreported += entry
        else:
            self._unreported += 1
            self._dropped += 1

    def _write_all(self) -> None:
        while not self._abandoned and (entry := self._next()) is not None:
            works = self._emit(f"{self._form(entry if isinstance(entry, str) else _report(entry))}\n")
            with self._changed:
                self._works = works
                if not works:
                    self._drop(entry)

    def _next(self) -> str | int | None:
        """Waits for the next entry; None when the relay was closed and has nothing left that it could write."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing or (self._unreported and self._works))
            if self._queue:
                entry = self._queue.popleft()
                self._chars -= 0 if isinstance(entry, int) else len(entry) + 1
                return entry
            if self._unreported and self._works:
                count, self._unreported = self._unreported, 0
                return count
            return None

    def _emit(self, text: str) -> bool:
        """Whether the text was written; not if the other end is closed, the disk is full, or the relay gave up."""
        try:
            if self._descriptor is None:
                self._stream.write(text)
                self._stream.flush()
                return True
            data = memoryview(text.encode(self._stream.encoding or "utf-8", errors="backslashreplace"))
            while data and self._wait_writable(self._descriptor):
                data = data[_write(self._descriptor, data[:PIECE_BYTES]) :]
            return not data
        except (OSError, ValueError):
            return False

    def _wait_writable(self, descriptor: int) -> bool:
        """False if the relay gave up waiting."""
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        while not self._abandoned:
            if poll.poll(1000 * POLL_S):
                return True
        return False


def json_line(line: str) -> str:
    """A line of the log as a JSON object: its time, and its facts or `message`."""
    found = MARKED.fullmatch(line)
    at = datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S,%f") if found else datetime.now()
    text = found[2] if found else line
    facts = (_facts(text) if found else None) or {"message": text}
    return json.dumps({"time": at.astimezone().isoformat(timespec="milliseconds"), **facts})


def _facts(text: str) -> dict[str, Any] | None:
    """What a line says as a JSON object; None for words."""
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return facts if isinstance(facts, dict) else None


class _RelayHandler(logging.Handler):
    def __init__(self, relay: LogRelay) -> None:
        super().__init__()
        self._relay = relay

    def emit(self, record: logging.LogRecord) -> None:
        for line in self.format(record).splitlines():
            self._relay.write(line)


def _descriptor(stream: TextIO) -> int | None:
    """None for a stream in memory. Otherwise the stream itself is not used, because its lock would be held."""
    try:
        return stream.fileno()
    except (OSError, io.UnsupportedOperation):
        return None


def _write(descriptor: int, data: memoryview) -> int:
    try:
        return os.write(descriptor, data)
    except BlockingIOError:  # another process has filled the pipe since
        return 0


def _report(count: int) -> str:
    were = "line was" if count == 1 else "lines were"
    return f"{count} log {were} dropped because nobody read them"
