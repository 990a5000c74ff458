"""Starts the gateway and talks to it: commands as JSON lines on its standard input, reports on its standard output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from live_avatar.errors import ServerError
from live_avatar.serving.gateway_settings import GatewaySettings

START_LIMIT_S: Final = 60.0
STOP_LIMIT_S: Final = 5.0
LAST_LINES: Final = 12
LAST_WORDS_S: Final = 2.0
"""How long the last lines of a gateway that has ended may take."""
REPORT_LIMIT_S: Final = 10.0
"""A gateway that has reported nothing for so long is not ready; it reports once a second."""
PRIVATE: Final = 0o077
MEMORY: Final = {"MALLOC_ARENA_MAX": "2"}
"""glibc keeps free memory for each of many arenas: large messages on gRPC's threads would leave tens of megabytes."""


class GatewayProcess:
    """The gateway with these settings. It can be started again after it has died.

    folder: its working directory. echo: is given each line that it logs.
    """

    def __init__(self, settings: GatewaySettings, folder: Path, echo: Callable[[bytes], None]) -> None:
        self._settings = settings
        self._folder = folder
        self._echo = echo
        self._process: subprocess.Popen[bytes] | None = None
        self._changed = threading.Condition()
        self._state: dict[str, Any] = {}
        self._reported_s = 0.0
        self._wanted: dict[str, object] = {}
        self._writing = threading.Lock()
        self._lines: deque[bytes] = deque(maxlen=LAST_LINES)
        self._readers: list[threading.Thread] = []

    def start(self) -> None:
        """Returns when its ports are open. Raises `ServerError` if they cannot be, or it ends.

        It is told its settings, and then the state that it is to be in.
        """
        self.stop()  # what is left of one that has died
        with self._changed:
            self._state = {}
            self._reported_s = time.monotonic()
        with self._writing:
            self._process = process = self._spawn()
            self._write(self._settings.to_json())
            self._write(json.dumps(self._wanted))
        self._readers = [
            threading.Thread(target=read, args=(process,), name=f"gateway-{name}", daemon=True)
            for name, read in (("reports", self._read_reports), ("log", self._read_log))
        ]
        for reader in self._readers:
            reader.start()
        with self._changed:
            self._changed.wait_for(lambda: {"listening", "error", "ended"} & self._state.keys(), START_LIMIT_S)
            state = dict(self._state)
        if "error" in state:
            self.stop()
            raise ServerError(str(state["error"]))
        if "listening" not in state:
            self.stop()
            last = b"\n".join(self._lines).decode(errors="replace")
            raise ServerError(f"the gateway ended with code {process.returncode} while it started:\n{last}")

    def _spawn(self) -> subprocess.Popen[bytes]:
        # -P: nothing is imported from the working directory.
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "live_avatar.gateway"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self._folder,
            env={**os.environ, **MEMORY},
            umask=PRIVATE,
            start_new_session=True,  # Ctrl-C comes to us, and we end it in order
        )

    @property
    def process_id(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def live_sessions(self) -> int:
        """Live sessions as the gateway last said; 0 if it has ended."""
        with self._changed:
            return int(self._state.get("live", 0))

    def wait_phase(self, phase: str, limit_s: float) -> None:
        """Returns when the gateway has said that it is in this phase, so that its live sessions are those since then;
        at the latest after so long, or when it has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._state.get("phase") == phase or "ended" in self._state, limit_s)

    @property
    def is_ready(self) -> bool:
        """Whether it takes new sessions, as it said a moment ago."""
        with self._changed:
            return bool(self._state.get("ready", False)) and self._silent_s() < REPORT_LIMIT_S

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def is_stuck(self, limit_s: float) -> bool:
        """Whether it runs and has reported nothing for so long."""
        with self._changed:
            return self.is_running() and self._silent_s() > limit_s

    def kill(self) -> None:
        process = self._process
        assert process is not None
        process.kill()
        process.wait()

    def command(self, **command: object) -> None:
        """Sends a command (`gateway.server.run`); does nothing if the gateway has ended."""
        with self._writing:
            self._write(json.dumps(command))

    def tell(self, **state: object) -> None:
        """Sends commands that say what state the gateway is to be in; one that is started later is told them as well,
        whenever it dies."""
        with self._writing:
            self._wanted |= state
            self._write(json.dumps(state))

    def stop(self) -> None:
        """Ends it; it is killed if it does not end in time."""
        process = self._process
        if process is None:
            return
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.close()
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for reader in self._readers:
            reader.join(LAST_WORDS_S)

    def _write(self, line: str) -> None:
        process = self._process
        if process is None:
            return
        assert process.stdin is not None
        with suppress(OSError, ValueError):  # it has ended
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()

    def _read_reports(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout as reports:
            for line in reports:
                with suppress(ValueError):  # a library has printed something
                    self._note(process, json.loads(line))
        self._note(process, {"ended": True, "ready": False, "live": 0})

    def _note(self, process: subprocess.Popen[bytes], report: dict[str, Any]) -> None:
        with self._changed:
            if process is self._process:  # not one that was started again since
                self._state |= report
                self._reported_s = time.monotonic()
                self._changed.notify_all()

    def _silent_s(self) -> float:
        return time.monotonic() - self._reported_s

    def _read_log(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        with process.stderr as log:
            for line in log:
                self._lines.append(line.rstrip())
                self._echo(line)


def wait_until(condition: Callable[[], bool], limit_s: float, poll_s: float = 0.05) -> bool:
    """Whether a condition became true within so long."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(poll_s)
    return True
