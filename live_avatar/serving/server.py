"""Starting and ending Triton: the server that the `nvidia-pytriton` wheel carries, or one on the PATH.

Prepares a private copy of the python backend with the stub for this Python, the environment that the
stages need, the models of the profile, and the command line. Knows of the models what their files say; watching over
them is the supervisor's.
"""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Final

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from live_avatar.errors import ServerError
from live_avatar.graphs.artifacts import Artifacts, load_artifacts
from live_avatar.graphs.memory import host_available_bytes, require_sessions
from live_avatar.serving import (
    ARTIFACTS_VARIABLE,
    CONTROL_VARIABLE,
    FLOOR_VARIABLE,
    LABEL_FONT_VARIABLE,
    LOG_MARK,
    PROFILE_VARIABLE,
    TRACE_VARIABLE,
    TURNS_VARIABLE,
)
from live_avatar.serving.access import Access, access_flags
from live_avatar.serving.control import Control
from live_avatar.serving.label import Label
from live_avatar.serving.supervisor import DRAIN_MARKER, Admin, Supervisor
from live_avatar.serving.turns import turns_value
from live_avatar_client.protocol import MODEL_NAME, STATUS_MODEL

MODEL_REPOSITORY = Path(__file__).parents[2] / "model_repository"
START_LIMIT_S = 1800.0  # a stage of the 14B model loads tens of gigabytes
STOP_LIMIT_S = 10.0
POLL_S = 0.1
LOG_LINES = 2000
LEAST_IDLE_S, GREATEST_IDLE_S = 1.0, 86_400.0
CANDIDATES = 4
"""Sequences that a batcher takes for each session: the one too many must reach conditioning, which refuses it."""
SHARED_MEMORY = Path("/dev/shm")
AUXILIARY_MODELS: Final = ("rolling_sink", STATUS_MODEL)
"""Models that are served beside the ensemble's."""
ANY_ADDRESS: Final = "0.0.0.0"
# Becomes the server ("$@"), and leaves a watcher in its process group: when the pipe on stdin closes, because the
# process that started the server is gone, however it went, the watcher ends the group, and removes the folder $0
# and the shared memory that is named after it.
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
NO_SUCH_GPU = re.compile(r"unsupported gpu id (\d+)\. GPUs with .*? are: ([\d, ]*)")
CHAIN_MODEL = re.compile(r'model_name: "(\w+)"')


@dataclass(frozen=True)
class ServerOptions:
    """What to serve and where. Ports on `address`; `trace` is a folder for the stages' busy intervals, and
    `stage_floor_s` the least time a stage takes for a block, `turns` stages of which one works at a time, as on one
    processor (both for measurements). None keeps what the profile says."""

    artifacts: Path
    profile: str = "cpu"
    address: str = "127.0.0.1"
    grpc_port: int = 8001
    http_port: int = 8000
    metrics_port: int = 8002
    model_repository: Path = MODEL_REPOSITORY
    max_sessions: int | None = None
    idle_seconds: float | None = None
    known_avatars: int | None = None
    label_font: Path | None = None
    access: Access = field(default_factory=Access)
    trace: Path | None = None
    stage_floor_s: float = 0.0
    turns: tuple[str, ...] = ()
    verbose: bool = False

    def on_free_ports(self) -> ServerOptions:
        """The same on ports that were free a moment ago, for tests and demos on this machine."""
        return replace(self, grpc_port=_free_port(), http_port=_free_port(), metrics_port=_free_port())

    @property
    def host(self) -> str:
        """The address for those on this machine."""
        return "127.0.0.1" if self.address == ANY_ADDRESS else self.address

    @property
    def url(self) -> str:
        """What a client on this machine connects to."""
        return f"{self.host}:{self.grpc_port}"


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

    def _read(self, stream: IO[bytes]) -> None:
        for line in stream:
            said = line.decode(errors="replace").rstrip("\n")
            self._lines.append(said)
            with suppress(OSError):  # whoever listened has gone; the server must not wait for it
                self._echo(said)


def is_for_operators(line: str) -> bool:
    """Whether a line of the log is a stage's own, or an error of Triton's that is none of our making."""
    return LOG_MARK in line or (line.startswith("E") and DRAIN_MARKER not in line)


class TritonServer:
    """A running server, watched over by `supervisor`."""

    def __init__(
        self,
        options: ServerOptions,
        process: subprocess.Popen[bytes],
        log: ServerLog,
        supervisor: Supervisor,
        admin: Admin,
    ) -> None:
        self.options = options
        self.process = process
        self.supervisor = supervisor
        self._log = log
        self._admin = admin

    def wait_ready(self, limit_s: float = START_LIMIT_S) -> None:
        """Returns when every model is ready. Raises `ServerError` if the server ends or `limit_s` passes."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                time.sleep(POLL_S)  # for its last words
                self._expect_gpus()
                raise ServerError(
                    f"Triton ended with code {self.process.returncode} while it started:\n{self.errors()}"
                )
            if self._admin.ready():
                return
            time.sleep(POLL_S)
        raise ServerError(f"Triton was not ready after {limit_s:g} s; the last it said:\n{self.errors()}")

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

    def _expect_gpus(self) -> None:
        missing = NO_SUCH_GPU.findall(self._log.text())
        if missing:
            wanted = ", ".join(sorted({number for number, _ in missing}, key=int))
            present = ", ".join(missing[0][1].split()) or "none"
            raise ServerError(
                f"profile {self.options.profile} needs GPU {wanted}, but Triton sees {present} on this machine; serve "
                "where there are enough of them, or choose another --profile."
            )


@contextmanager
def serving(options: ServerOptions, echo: Callable[[str], None] = lambda line: None) -> Iterator[TritonServer]:
    """A server that is ready inside the `with` and gone after it, workers and temporary files included.

    `echo` is given every line that Triton and the stages write. Raises `ArtifactError` for unusable artifacts,
    `CapacityError` for more sessions than memory has room for, and `ServerError` for a taken port, a key or certificate
    that cannot be used, a profile that is unknown, has another number of steps than the artifacts, or needs GPUs that
    are not there, or a server that does not come up.
    """
    _check(options)
    secret = secrets.token_hex(32)
    access = access_flags(options.access, options.address, secret)
    with tempfile.TemporaryDirectory(prefix="live-avatar-") as scratch:
        models = _models(options, Path(scratch))
        control = Path(scratch) / "control"
        control.mkdir()
        command = [*_command(options, models, _backends(Path(scratch)), Path(scratch).name), *access]
        process = subprocess.Popen(
            ["/bin/sh", "-c", WATCHDOG_SCRIPT, scratch, *command],
            env=_environment(options, control),
            stdin=subprocess.PIPE,  # held open, never written to
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C comes to us, and we end the server in order
        )
        assert process.stdin is not None
        assert process.stdout is not None
        log = ServerLog(echo)
        reader = log.follow(process.stdout)
        admin = Admin(f"http://{options.host}:{options.http_port}", secret)
        stages = [path.name for path in models.iterdir() if (path / "1").exists() and path.name != MODEL_NAME]
        supervisor = Supervisor(
            process.pid, stages, admin, Control(control), START_LIMIT_S, lambda: process.poll() is None
        )
        server = TritonServer(options, process, log, supervisor, admin)
        try:
            server.wait_ready()
            with supervisor:
                yield server
        finally:
            server.stop()
            process.stdin.close()
            reader.join(POLL_S)
            process.stdout.close()
            for region in SHARED_MEMORY.glob(f"{Path(scratch).name}*"):  # a server ended early leaves it behind
                region.unlink(missing_ok=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _check(options: ServerOptions) -> None:
    artifacts = load_artifacts(options.artifacts)
    profiles = sorted(path.stem for path in options.model_repository.glob(f"{MODEL_NAME}/configs/*.pbtxt"))
    if not profiles:
        raise ServerError(
            f"{options.model_repository} is not the project's model repository; run from a checkout or give "
            "--model-repository."
        )
    if options.profile not in profiles:
        raise ServerError(f"there is no profile {options.profile!r}; choose one of {', '.join(profiles)}.")
    _check_steps(options, profiles, artifacts.preset.stream.steps)
    _check_sessions(options, artifacts)
    ports = {
        "--grpc-port": options.grpc_port,
        "--http-port": options.http_port,
        "--metrics-port": options.metrics_port,
    }
    if len(set(ports.values())) < len(ports):
        named = ", ".join(f"{option} {port}" for option, port in ports.items())
        raise ServerError(f"{named}: two of these are the same; give each a port of its own.")
    for option, port in ports.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((options.address, port))
            except OSError as error:
                raise ServerError(
                    f"cannot listen on {options.address}:{port} ({error.strerror}); choose another {option} or "
                    "--address."
                ) from error
    if options.trace is not None:
        try:
            options.trace.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ServerError(f"cannot write to {options.trace} ({error.strerror}); choose another --trace.") from error


def _check_sessions(options: ServerOptions, artifacts: Artifacts) -> None:
    """Refuses more than fits; a stage on a GPU finds out by itself, when its weights are loaded."""
    if options.idle_seconds is not None and not LEAST_IDLE_S <= options.idle_seconds <= GREATEST_IDLE_S:
        raise ServerError(
            f"--idle-seconds is {options.idle_seconds:g}; give {LEAST_IDLE_S:g} to {GREATEST_IDLE_S:g} seconds."
        )
    if options.label_font is not None:
        Label("A", artifacts.preset.stream.height, artifacts.preset.stream.width, options.label_font)
    conditioning = _config(options, "conditioning")
    if conditioning.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_CPU:
        sessions, avatars = (int(conditioning.parameters[n].string_value) for n in ("max_sessions", "known_avatars"))
        require_sessions(artifacts.preset, sessions, avatars, host_available_bytes(), agreed=artifacts.contracts)


def _check_steps(options: ServerOptions, profiles: list[str], exported: int) -> None:
    steps = {profile: _steps(_chain(options.model_repository, profile)) for profile in profiles}
    if steps[options.profile] != exported:
        fitting = [profile for profile in profiles if steps[profile] == exported]
        choose = f"choose --profile {' or '.join(fitting)}, or " if fitting else ""
        raise ServerError(
            f"profile {options.profile} serves {steps[options.profile]} denoising steps, but {options.artifacts} was "
            f"exported with {exported}; {choose}export with {steps[options.profile]} (`live-avatar export --help`)."
        )


def _steps(chain: list[str]) -> int:
    return sum(model.startswith("dit_step_") for model in chain)


def _chain(repository: Path, profile: str) -> list[str]:
    """The models that a profile's ensemble calls, in order."""
    return CHAIN_MODEL.findall((repository / MODEL_NAME / "configs" / f"{profile}.pbtxt").read_text())


def _config(options: ServerOptions, model: str) -> model_config_pb2.ModelConfig:
    """A model's configuration in the profile, with what the options say instead."""
    path = options.model_repository / model / "configs" / f"{options.profile}.pbtxt"
    config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    changes: dict[str, object] = {}
    if options.max_sessions is not None:
        changes["max_sessions"] = options.max_sessions
    if options.known_avatars is not None:
        changes["known_avatars"] = options.known_avatars
    if options.idle_seconds is not None:
        changes["idle_limit_s"] = options.idle_seconds
        if config.HasField("sequence_batching"):
            config.sequence_batching.max_sequence_idle_microseconds = round(options.idle_seconds * 1e6)
    for name, value in changes.items():
        if name in config.parameters:
            config.parameters[name].string_value = str(value)
    if options.max_sessions is not None and config.HasField("sequence_batching"):
        oldest = config.sequence_batching.oldest
        oldest.max_candidate_sequences = max(oldest.max_candidate_sequences, CANDIDATES * options.max_sessions)
    return config


def _models(options: ServerOptions, scratch: Path) -> Path:
    """A model repository with the models of the profile, as the options want them, and one that cannot be loaded."""
    folder = scratch / "models"
    for model in (MODEL_NAME, *AUXILIARY_MODELS, *_chain(options.model_repository, options.profile)):
        place = folder / model
        place.mkdir(parents=True)
        place.joinpath("config.pbtxt").write_text(text_format.MessageToString(_config(options, model)))
        if model == MODEL_NAME:
            place.joinpath("1").mkdir()
        else:
            place.joinpath("1").symlink_to(options.model_repository.resolve() / model / "1")
    place = folder / DRAIN_MARKER
    place.mkdir()
    place.joinpath("config.pbtxt").write_text('backend: "python"\n')  # and no version of it
    return folder


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
    shutil.copytree(bundled / "backends" / "python", target)
    shutil.copy2(stub, target)
    return target.parent


def _command(options: ServerOptions, models: Path, backends: Path | None, memory: str) -> list[str]:
    bundled = _bundled()
    binary = str(bundled / "bin" / "tritonserver") if bundled else shutil.which("tritonserver")
    if binary is None:
        raise ServerError("there is no Triton server: install nvidia-pytriton, or run in Triton's container.")
    command = [
        binary,
        f"--model-repository={models}",
        # Loading and unloading is the supervisor's alone: see access.py.
        "--model-control-mode=explicit",
        *(f"--load-model={model}" for model in (MODEL_NAME, *AUXILIARY_MODELS)),
        "--disable-auto-complete-config",
        "--exit-timeout-secs=2",
        f"--backend-config=python,shm-region-prefix-name={memory}",
        f"--log-info={str(options.verbose).lower()}",
    ]
    if backends is not None:
        command.append(f"--backend-directory={backends}")
    for service, port in (
        ("grpc", options.grpc_port),
        ("http", options.http_port),
        ("metrics", options.metrics_port),
    ):
        command += [f"--{service}-address={options.address}", f"--{service}-port={port}"]
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
    environment[ARTIFACTS_VARIABLE] = str(options.artifacts.resolve())
    environment[PROFILE_VARIABLE] = options.profile
    environment[CONTROL_VARIABLE] = str(control)
    environment[FLOOR_VARIABLE] = str(options.stage_floor_s)
    if options.label_font is not None:
        environment[LABEL_FONT_VARIABLE] = str(options.label_font.resolve())
    if options.turns:
        environment[TURNS_VARIABLE] = turns_value(control.with_name("turn"), options.turns)
    environment["OMP_NUM_THREADS"] = "1"
    if options.trace is not None:
        environment[TRACE_VARIABLE] = str(options.trace.resolve())
    return environment


def _prepend(environment: dict[str, str], name: str, folders: list[str]) -> None:
    present = [environment[name]] if environment.get(name) else []
    environment[name] = os.pathsep.join(dict.fromkeys([*folders, *present]))
