"""Supervises a running Triton: loads stages again whose process died, and drains the server.

When a stage's process dies, Triton stays up and "ready" but never answers (tried on 2.51). So the supervisor unloads
the model and loads it again; readiness is false meanwhile. To drain, it loads a model that cannot be loaded: readiness
becomes false at once, over HTTP and gRPC, and live sessions are not affected.
"""

from __future__ import annotations

import http.client
import json
import logging
import threading
import time
import urllib.request
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from live_avatar.serving.access import SUPERVISOR_KEY
from live_avatar.serving.control import Control, Phase
from live_avatar_client.protocol import STATUS_MODEL

log = logging.getLogger(__name__)

DRAIN_MARKER: Final = "draining"
"""Name of a model that cannot be loaded; loading it makes Triton not ready."""
WATCH_S = 0.25
RETRY_S = 5.0
STOP_LIMIT_S = 2.0  # shorter than the load of a large model, which may take minutes
DRAIN_POLL_S = 0.1
CLOSING_S = 2.0
"""Time in which live sessions can get their error; a speaking session sends a block every 0.48 s."""
LAST_ANSWER_S = 0.3
"""Time for the last frames to get from the last stage to the client."""
PROCESSES = Path("/proc")
STUB = "triton_python_backend_stub"
ALIVE = frozenset("RSDTtIP")  # states of a process that is not a zombie
# The environment's proxy is only for other machines.
WITHOUT_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Admin:
    """Triton's HTTP API at `url`, with the secret that model control needs."""

    def __init__(self, url: str, secret: str) -> None:
        self._url = url
        self._secret = secret

    def ready(self) -> bool:
        """Whether Triton reports every model as ready."""
        return self._ask(urllib.request.Request(f"{self._url}/v2/health/ready"), limit_s=1.0)

    def load(self, model: str, limit_s: float = 10.0) -> bool:
        """Loads a model, also one that was unloaded; returns whether it is loaded."""
        return self._control(model, "load", limit_s)

    def unload(self, model: str) -> None:
        self._control(model, "unload", 10.0)

    def _control(self, model: str, what: str, limit_s: float) -> bool:
        request = urllib.request.Request(
            f"{self._url}/v2/repository/models/{model}/{what}",
            data=json.dumps({}).encode(),
            headers={SUPERVISOR_KEY: self._secret},
            method="POST",
        )
        return self._ask(request, limit_s)

    def _ask(self, request: urllib.request.Request, limit_s: float) -> bool:
        try:
            with WITHOUT_PROXY.open(request, timeout=limit_s) as response:
                return bool(response.status == 200)
        except (OSError, http.client.HTTPException):
            return False


class Supervisor:
    """Watches the stages `models` of the Triton with process id `process`, in a thread, inside a `with` statement."""

    def __init__(
        self,
        process: int,
        models: Collection[str],
        admin: Admin,
        control: Control,
        load_limit_s: float,
        is_running: Callable[[], bool],
    ) -> None:
        self._process = process
        self._models = frozenset(models)
        self._admin = admin
        self._control = control
        self._load_limit_s = load_limit_s
        self._is_running = is_running
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(STOP_LIMIT_S)

    def drain(self, seconds: float) -> bool:
        """Refuses new sessions, waits `seconds` for the live ones, then ends the rest with an error.

        Returns whether all sessions ended by themselves.
        """
        self._control.set_phase(Phase.DRAINING)
        self._admin.load(DRAIN_MARKER)
        ended = self._wait_empty(seconds)
        if not ended:
            self._control.set_phase(Phase.CLOSING)
            self._wait_empty(CLOSING_S)
        time.sleep(LAST_ANSWER_S)
        return ended

    def _wait_empty(self, seconds: float) -> bool:
        """Waits until all sessions or Triton have ended, at most `seconds`; returns whether no session is live."""
        deadline = time.monotonic() + seconds
        while self._is_running() and self._control.live_sessions and time.monotonic() < deadline:
            time.sleep(DRAIN_POLL_S)
        return not self._control.live_sessions

    def _watch(self) -> None:
        while not self._over.wait(WATCH_S):
            try:
                for model in sorted(self._models - living_stages(self._process)):
                    self._reload(model)
            except Exception:  # watching must go on after any error
                log.exception("could not look after the stages")

    def _reload(self, model: str) -> None:
        """Loads a model again whose process is gone. The other stages drop all sessions, because their state in this
        stage is lost. They are told while the ensemble is unloaded, so no newer session is dropped."""
        if self._is_over():
            return
        log.warning("the process of %s is gone; loading it again", model)
        self._admin.unload(model)
        if self._is_over():
            return
        if model != STATUS_MODEL:  # `status` has no sessions
            self._control.advance_reload_epoch()
        if not self._admin.load(model, self._load_limit_s) and not self._is_over():
            log.error("%s could not be loaded again; trying once more in %g s", model, RETRY_S)
            self._over.wait(RETRY_S)

    def _is_over(self) -> bool:
        return self._over.is_set() or not self._is_running()


def living_stages(triton: int) -> set[str]:
    """Names of the models whose python process is a living child of the process `triton`."""
    found = set()
    for folder in PROCESSES.iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):  # it has ended meanwhile
                found |= _stage(folder, triton)
    return found


def _stage(process: Path, triton: int) -> set[str]:
    """{model} if a process is a living stage of that Triton, else an empty set."""
    state, parent = process.joinpath("stat").read_bytes().decode(errors="replace").rpartition(")")[2].split()[:2]
    if int(parent) != triton or state not in ALIVE:
        return set()
    model = model_of(process.joinpath("cmdline").read_bytes().decode(errors="replace").split("\0"))
    return {model} if model else set()


def model_of(command: Sequence[str]) -> str | None:
    """The model of a stage's process, from its command line STUB MODEL/VERSION/model.py ...; else None."""
    return Path(command[1]).parents[1].name if command[0].endswith(STUB) and len(command) > 1 else None
