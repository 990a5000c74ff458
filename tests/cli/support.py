"""How the tests run commands, and the files they run them on."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
from click.testing import CliRunner, Result

from live_avatar.arrays import Array
from live_avatar.cli.main import main
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.serving.server_options import ServerOptions

COMMANDS = (
    "generate",
    "export",
    "serve",
    "stream",
    "say",
    "web",
    "talk",
    "repository",
    "doctor",
    "keys",
    "demo",
    "verify",
    "watermark-key",
    "signing-key",
)
SAMPLE_RATE_HZ = 16_000
PATIENCE_S = 180.0
NOBODY = 65_534


def invoke(*arguments: object) -> Result:
    """Runs a command in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="live-avatar")


def assert_refused(result: Result | subprocess.CompletedProcess[str], *words: str) -> None:
    """One sentence on stderr that has all of `words`, exit code 2, nothing else."""
    code = result.exit_code if isinstance(result, Result) else result.returncode
    assert code == 2, (result.stderr, getattr(result, "exception", None))
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    for word in words:
        assert word in lines[0]


def command(*arguments: object) -> list[str]:
    """A command for a process of its own."""
    return [sys.executable, "-m", "live_avatar.cli", *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=2 * PATIENCE_S)


class Running:
    """A command in a process of its own. Its folder for temporary files tells which other processes it has started.

    It knows the folder by a short link: the path of a socket has at most 107 bytes.
    """

    def __init__(self, temporary: Path, *arguments: object) -> None:
        temporary.mkdir()
        self._temporary = Path(tempfile.gettempdir()) / f"run-{secrets.token_hex(4)}"
        self._temporary.symlink_to(temporary, target_is_directory=True)
        self._servers: list[str] = []  # a server's folder and its shared memory have one name
        self._process = subprocess.Popen(
            command(*arguments),
            env={**os.environ, "TMPDIR": str(self._temporary), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def await_line(self, start: str) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(start):
                return
        raise AssertionError(f"ended with {self._process.wait()} before saying {start!r}")

    def await_file(self, folder: Path, pattern: str) -> None:
        wait_until(lambda: any(folder.glob(pattern)) or self._process.poll() is not None)
        assert self._process.poll() is None

    def end(self, *numbers: signal.Signals) -> tuple[int, str]:
        """Sends signals, 50 ms apart, and returns the exit code and what stderr said."""
        self._servers = [path.name for path in self._temporary.glob("live-avatar-*")]
        for number in numbers:
            self._process.send_signal(number)
            time.sleep(0.05)
        return self.wait()

    def end_unread(self, number: signal.Signals) -> int:
        """Sends a signal, and returns the exit code; nobody reads what is said."""
        self._process.send_signal(number)
        return self._process.wait(PATIENCE_S)

    def wait(self) -> tuple[int, str]:
        _, said = self._process.communicate(timeout=PATIENCE_S)
        return self._process.returncode, said

    def left(self) -> list[str]:
        """The processes, temporary folders and shared memory that are still there."""
        names = [path.name for path in self._temporary.glob("live-avatar-*")]
        memory = [region.name for name in self._servers for region in Path("/dev/shm").glob(f"{name}*")]
        return [*(line for _, line in self.processes()), *names, *memory]

    def kill_server(self) -> None:
        """Kills Triton, as the kernel does when memory runs out."""
        [server] = [number for number, line in self.processes() if "/tritonserver " in line.split(" --")[0] + " "]
        os.kill(server, signal.SIGKILL)

    def kill(self) -> None:
        """For the end of a test; it has ended unless the test failed."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
        self._temporary.unlink(missing_ok=True)

    def processes(self) -> Iterator[tuple[int, str]]:
        """Number and command line of each that has inherited the folder, zombies aside."""
        mark = f"TMPDIR={self._temporary}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    yield int(folder.name), (folder / "cmdline").read_text().replace("\0", " ")
            except OSError:  # it has ended meanwhile, or is another user's
                continue


@contextmanager
def served(temporary: Path, artifacts: Artifacts, *options: object) -> Iterator[tuple[Running, ServerOptions]]:
    """`live-avatar serve` in a process of its own."""
    free = ServerOptions(artifacts.folder).on_free_ports()
    ports = ("--grpc-port", free.grpc_port, "--http-port", free.http_port, "--metrics-port", free.metrics_port)
    running = Running(temporary, "serve", "--artifacts", artifacts.folder, *ports, *options)
    try:
        running.await_line("Serving ")
        yield running, free
    finally:
        running.kill()


def wait_until(condition: Callable[[], object], limit_s: float = PATIENCE_S) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not so after {limit_s:g} s"
        time.sleep(0.02)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may read and write everything, so tests that run as root become nobody for a while."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


def tone(seconds: float, rate_hz: int = SAMPLE_RATE_HZ) -> Array:
    """300 Hz, float64 [samples] in -0.4..0.4."""
    wave: Array = np.sin(np.arange(round(seconds * rate_hz)) * 2 * np.pi * 300 / rate_hz) * 0.4
    return wave


def write_audio(path: Path, samples: Array, codec: str, rate_hz: int = SAMPLE_RATE_HZ, layout: str = "mono") -> Path:
    """Encodes float samples, [samples] in -1..1, the same in every channel."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate_hz, layout=layout)
        assert isinstance(stream, av.AudioStream)
        channels = np.repeat(samples[np.newaxis].astype(np.float32), stream.layout.nb_channels, axis=0)
        frame = av.AudioFrame.from_ndarray(channels, "fltp", layout)
        frame.sample_rate = rate_hz
        frame.pts = 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def frames_of(samples: int) -> int:
    """One for every started 40 ms."""
    return -(-samples // 640)
