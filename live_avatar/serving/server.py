"""Starts and stops Triton: the server in the `nvidia-pytriton` wheel, or one on the PATH.

Prepares a private copy of the python backend with the stub for this Python, the environment of the stages, the model
repository and the command line.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from live_avatar.errors import ServerError
from live_avatar.graphs.artifacts import load_artifacts
from live_avatar.serving import LOG_MARK
from live_avatar.serving.access import check_access
from live_avatar.serving.checks import check, gateway_settings, served_profile
from live_avatar.serving.control import Control
from live_avatar.serving.gateway_process import PRIVATE, GatewayProcess, wait_until
from live_avatar.serving.gateway_settings import control_folder, metrics_socket, triton_target
from live_avatar.serving.health import health_port
from live_avatar.serving.profiles import Profile
from live_avatar.serving.repository import IDLE_MARGIN_S, write_repository
from live_avatar.serving.server_options import ServerOptions
from live_avatar.serving.settings import StageSettings
from live_avatar.serving.supervisor import Admin, Supervisor, living_stages
from live_avatar.serving.tensors import AVATAR_ENCODER, ROLLING_SINK
from live_avatar.serving.turns import turns_value
from live_avatar_client.protocol import MODEL_NAME

START_LIMIT_S = 1800.0  # a stage of the 14B model loads tens of gigabytes
STOP_LIMIT_S = 10.0
GATEWAY_READY_S = 15.0
"""How long the gateway may take to open once Triton is ready; it gives Triton its shared memory first."""
POLL_S = 0.1
LAST_WORDS_S = 3.0
"""How long Triton may take to report a stage that failed while it started."""
MAX_SOCKET_PATH = 100  # bytes; Linux takes 107
LOG_LINES = 2000
SHARED_MEMORY = Path("/dev/shm")
# Replaces itself with the server ("$@"), and leaves a watchdog in the server's process group. The pipe on stdin closes
# when the process that started the server ends for any reason. The watchdog then ends the group, and removes the folder
# $0 and the shared memory of the same name.
WATCHDOG_SCRIPT = """
exec 3<&0 4</dev/null
(
  trap '' TERM
  read _ <&3
  kill -s TERM -- -$$
  for _ in $(seq 100); do kill -s 0 $$ || break; sleep 0.1; done
  rm -rf -- "$0" "/dev/shm/${0##*/}"*
  kill -s KILL -- -$$
) >/dev/null 2>&1 4<&- &
exec "$@" <&4 3<&- 4<&-
"""
FAILED_MODEL = re.compile(r"failed to (?:load|start) ('.*?')(?: version \d+)?: (?:\w+: )*(.*)")
LOAD_FAILURE = re.compile(r'"(failed to (?:load|start) .*?)(\\n|")')


class ServerLog:
    """The last lines that a server wrote, each also given to `echo`. Reads them as they come, in a thread."""

    def __init__(self, echo: Callable[[str], None]) -> None:
        self._echo = echo
        self._lines: deque[str] = deque(maxlen=LOG_LINES)

    def follow(self, stream: IO[bytes]) -> threading.Thread:
        thread = threading.Thread(target=self._read, args=(stream,), name="server-log", daemon=True)
        thread.start()
        return thread

    def text(self) -> str:
        return "\n".join(list(self._lines))

    def add(self, line: bytes) -> None:
        said = line.decode(errors="replace").rstrip("\n")
        self._lines.append(said)
        self._echo(said)

    def _read(self, stream: IO[bytes]) -> None:
        for line in stream:
            self.add(line)


def is_for_operators(line: str) -> bool:
    """Whether a line of the log is a stage's own, or an error of Triton's that is none of our making."""
    return LOG_MARK in line or line.startswith("E")


class TritonServer:
    """A running server: Triton, the gateway before it, and the supervisor of both."""

    def __init__(
        self,
        options: ServerOptions,
        process: subprocess.Popen[bytes],
        log: ServerLog,
        supervisor: Supervisor,
        admin: Admin,
        gateway: GatewayProcess,
        shared_memory: str,
    ) -> None:
        self.options = options
        self.process = process
        self.supervisor = supervisor
        self.gateway = gateway
        self._log = log
        self._admin = admin
        self._shared_memory = shared_memory

    def wait_ready(self, limit_s: float = START_LIMIT_S) -> None:
        """Returns when every model is ready.

        Raises `ServerError` if Triton ends, the process of a stage ends before its model is ready, or `limit_s` passes.
        """
        deadline = time.monotonic() + limit_s
        started: set[str] = set()
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                time.sleep(POLL_S)  # for its last words
                raise ServerError(
                    f"Triton ended with code {self.process.returncode} while it started:\n{self.errors()}"
                )
            make_private(self._shared_memory)
            if self._admin.ready():
                return
            alive = living_stages(self.process.pid).keys()
            started |= alive
            if gone := sorted(started - alive):
                self._expect_stages(gone)
            time.sleep(POLL_S)
        raise ServerError(f"Triton was not ready after {limit_s:g} s; the last it said:\n{self.errors()}")

    def _expect_stages(self, gone: list[str]) -> None:
        """Raises `ServerError` for stages whose process has ended, unless Triton reports the reason itself."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(LAST_WORDS_S)
        if self.process.poll() is None:
            raise ServerError(
                f"stage {', '.join(gone)} ended without an error of its own while the server started (the kernel ends "
                f"a process that takes too much memory); the last lines of the log:\n{self.errors()}"
            )

    def errors(self, lines: int = 12) -> str:
        """What the log says went wrong, without Python's tracebacks; its last lines if it says nothing."""
        said = self._log.text()
        failures = [failure for failure, _ in LOAD_FAILURE.findall(said)]
        models: dict[str, set[str]] = {}
        for named in filter(None, map(FAILED_MODEL.match, failures)):
            models.setdefault(named[2], set()).add(named[1])
        wrong = [f"failed to load {', '.join(sorted(names))}: {cause}" for cause, names in models.items()]
        wrong += dict.fromkeys(failure for failure in failures if not FAILED_MODEL.match(failure))
        return "\n".join(wrong) or "\n".join(said.splitlines()[-lines:])

    @property
    def process_ids(self) -> tuple[int, int]:
        """Triton's and the gateway's, each the leader of a process group."""
        return self.process.pid, self.gateway.process_id

    def is_running(self) -> bool:
        return self.process.poll() is None

    def drain(self, seconds: float) -> bool:
        """Not ready any more, no new sessions; returns when the live ones have ended, by themselves if True."""
        return self.supervisor.drain(seconds)

    def stop(self, limit_s: float = STOP_LIMIT_S) -> None:
        """Ends the server and all its workers; those that do not end within `limit_s` are killed."""
        try:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(limit_s)
        finally:  # also if Ctrl-C comes while it waits
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # the group is the server's own: workers it left behind
            self.process.wait()


@contextmanager
def serving(options: ServerOptions, echo: Callable[[str], None] = lambda line: None) -> Iterator[TritonServer]:
    """A server that is ready inside the `with` and gone after it, workers and temporary files included.

    `echo` is given every line that Triton, the stages and the gateway write; it must not block. Raises `ArtifactError`
    for unusable artifacts, `CapacityError` for more sessions than memory has room for, `ConfigError` for a profile that
    is unknown or wrong, or needs GPUs that are not there, and `ServerError` for a profile of another number of steps
    than the artifacts, a taken port, a key or certificate that cannot be used, or a server that does not come up.
    """
    profile = served_profile(options)
    check(options, profile)
    check_access(options.access)
    with _scratch_folder() as scratch:
        files = _Files(scratch, options, profile)
        files.write()
        log = ServerLog(echo)
        gateway = GatewayProcess(gateway_settings(options, profile, scratch), files.work, log.add)
        gateway.start()
        try:
            with (
                health_port(options.address, options.health_port, lambda: gateway.is_ready),
                _triton(options, files, log, gateway) as server,
            ):
                yield server
        finally:
            gateway.stop()


@contextmanager
def _triton(options: ServerOptions, files: _Files, log: ServerLog, gateway: GatewayProcess) -> Iterator[TritonServer]:
    process = subprocess.Popen(
        ["/bin/sh", "-c", WATCHDOG_SCRIPT, str(files.scratch), *files.command()],
        env=_environment(options, files.control),
        cwd=files.work,  # Python in the stages imports from the working directory
        umask=PRIVATE,
        stdin=subprocess.PIPE,  # held open, never written to
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C comes to us, and we end the server in order
    )
    assert process.stdin is not None
    assert process.stdout is not None
    reader = log.follow(process.stdout)
    admin = Admin(triton_target(files.scratch))
    supervisor = Supervisor(
        process.pid,
        files.stages,
        admin,
        Control(files.control),
        gateway,
        START_LIMIT_S,
        options.answer_seconds,
        lambda: process.poll() is None,
        files.write,
        lambda: make_private(files.scratch.name),
    )
    server = TritonServer(options, process, log, supervisor, admin, gateway, files.scratch.name)
    try:
        server.wait_ready()
        with supervisor:
            wait_until(lambda: gateway.is_ready, GATEWAY_READY_S)
            yield server
    finally:
        gateway.stop()  # first, so that Triton has no stream open
        server.stop()
        admin.close()
        process.stdin.close()
        reader.join(POLL_S)
        process.stdout.close()
        for region in SHARED_MEMORY.glob(f"{files.scratch.name}*"):  # a server ended early leaves it behind
            region.unlink(missing_ok=True)


def make_private(prefix: str) -> None:
    """Takes the stages' shared memory from other users: Triton makes it readable for all, whatever the umask."""
    for region in SHARED_MEMORY.glob(f"{prefix}*"):
        with suppress(OSError):  # it is gone, or not ours
            region.chmod(0o600)


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    """A folder of this user alone. A lock on it keeps systemd-tmpfiles away, which removes old files from TMPDIR."""
    with tempfile.TemporaryDirectory(prefix="live-avatar-") as name:
        scratch = Path(name)
        if len(os.fsencode(scratch)) + len("/metrics") > MAX_SOCKET_PATH:
            raise ServerError(
                f"the temporary folder {scratch} is too long a path for a socket ({len(os.fsencode(scratch))} bytes); "
                "set TMPDIR to a shorter one, such as /tmp."
            )
        folder = os.open(scratch, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_SH)
            yield scratch
        finally:
            os.close(folder)


class _Files:
    """What a server has on disk: models, backend, control files and an empty working directory, all in `scratch`."""

    def __init__(self, scratch: Path, options: ServerOptions, profile: Profile) -> None:
        self.scratch = scratch
        self.control = control_folder(scratch)
        self.work = scratch / "work"
        self._models = scratch / "models"
        self._options = options
        self._profile = profile
        self.stages: list[str] = []

    def write(self) -> None:
        """Makes what is missing; `stages` are then the models that have a process."""
        for folder in (self.control, self.work):
            folder.mkdir(exist_ok=True)
        self.stages = write_repository(self._profile, self._models, IDLE_MARGIN_S)
        _backends(self.scratch)

    def command(self) -> list[str]:
        """Triton's command line."""
        return _command(self._options, self._models, _backends(self.scratch), self.scratch)


def _bundled() -> Path | None:
    """Folder of the Triton inside the `nvidia-pytriton` wheel."""
    found = importlib.util.find_spec("pytriton")
    if found is None or found.origin is None:
        return None
    folder = Path(found.origin).parent / "tritonserver"
    return folder if (folder / "bin" / "tritonserver").is_file() else None


def _backends(scratch: Path) -> Path | None:
    """A private backend folder with the stub for the running Python; None if the installed server has its own."""
    bundled = _bundled()
    if bundled is None:
        return None
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = bundled / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        known = sorted(path.name for path in (bundled / "python_backend_stubs").iterdir())
        raise ServerError(f"Triton's python backend has no stub for Python {version}; use one of {', '.join(known)}.")
    target = scratch / "backends" / "python"
    if not (target / stub.name).exists():
        shutil.copytree(bundled / "backends" / "python", target, dirs_exist_ok=True)
        shutil.copy2(stub, target)
    return target.parent


def _command(options: ServerOptions, models: Path, backends: Path | None, scratch: Path) -> list[str]:
    bundled = _bundled()
    binary = str(bundled / "bin" / "tritonserver") if bundled else shutil.which("tritonserver")
    if binary is None:
        raise ServerError("there is no Triton server: install nvidia-pytriton, or run in Triton's container.")
    command = [
        binary,
        f"--model-repository={models}",
        "--model-control-mode=explicit",
        *(f"--load-model={model}" for model in (MODEL_NAME, ROLLING_SINK, AVATAR_ENCODER)),
        "--disable-auto-complete-config",
        "--exit-timeout-secs=2",
        f"--backend-config=python,shm-region-prefix-name={scratch.name}",
        f"--log-info={str(options.verbose).lower()}",
        # Sockets in a folder of this user: nobody but the gateway and the supervisor reaches Triton.
        f"--grpc-address=unix:{scratch}/grpc",
        "--grpc-port=1",
        "--allow-http=false",
        f"--metrics-address=unix:{metrics_socket(scratch)}",
        "--metrics-port=1",
    ]
    if backends is not None:
        command.append(f"--backend-directory={backends}")
    return command


def _environment(options: ServerOptions, control: Path) -> dict[str, str]:
    environment = dict(os.environ)
    libraries = [str(sysconfig.get_config_var("LIBDIR"))]
    bundled = _bundled()
    if bundled is not None:
        libraries.insert(0, str(bundled.parents[1] / "nvidia_pytriton.libs"))
    _prepend(environment, "LD_LIBRARY_PATH", libraries)
    # The stub embeds an isolated Python that ignores PYTHONPATH; it takes its packages from the environment of
    # the first `python3` on the PATH, which must be ours.
    _prepend(environment, "PATH", [str(Path(sys.executable).parent)])
    settings = StageSettings(
        artifacts=options.artifacts.resolve(),
        manifest=load_artifacts(options.artifacts).manifest_sha256,
        control=control,
        label_font=options.label_font and options.label_font.resolve(),
        label=options.label,
        watermark=options.watermark and options.watermark.resolve(),
        trace=options.trace and options.trace.resolve(),
        stage_floor_s=options.stage_floor_s,
        turns=turns_value(control.with_name("turn"), options.turns) if options.turns else None,
    )
    return environment | settings.to_environment() | {"OMP_NUM_THREADS": "1"}


def _prepend(environment: dict[str, str], name: str, folders: list[str]) -> None:
    present = [environment[name]] if environment.get(name) else []
    environment[name] = os.pathsep.join(dict.fromkeys([*folders, *present]))
