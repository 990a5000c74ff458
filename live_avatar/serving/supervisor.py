"""Watches over a running server: brings back a stage or a gateway whose process died or is stuck, and ends the sessions
in order.

A dead stage leaves Triton up and "ready", and answers nothing for ever (tried on 2.51), so its model is unloaded and
loaded again. Meanwhile the gateway is not ready, and has told the callers of all live sessions that they are lost. A
process that runs but does not work (stopped, or in an endless loop) is killed, and then is a dead one.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from live_avatar.errors import ServerError
from live_avatar.serving.control import Control
from live_avatar.serving.gateway_process import GatewayProcess, wait_until
from live_avatar.serving.tensors import AVATAR_ENCODER

log = logging.getLogger(__name__)

WATCH_S = 0.25
RETRY_S = 5.0
STOP_LIMIT_S = 2.0  # a model that loads for minutes is not waited for
GATEWAY_LIMIT_S = 30.0
"""A gateway that has reported nothing for so long is stuck."""
ENCODER_PATIENCE = 5.0
"""How many times longer the avatar encoder may take: on a CPU it gets what the live sessions leave."""
LONGEST_STEP_S = 1.0
"""What counts at most between two looks at a stage: the machine may have slept meanwhile, and we with it."""
CLOSING_S = 2.0
"""How long live sessions are left to fetch their error: a speaking one sends a block every 0.48 s."""
PHASE_LIMIT_S = 1.0
"""How long the gateway may take to say that it drains."""
LAST_ANSWER_S = 0.3
"""How long the last frames may take from the gateway to the client."""
PROCESSES = Path("/proc")
STUB = "triton_python_backend_stub"
ALIVE = frozenset("RSDTtIP")  # states of a process that is not a zombie
# A proxy of the environment is for other machines.
WITHOUT_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Admin:
    """Triton's gRPC API at `target`, of which only the supervisor has the address."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)])
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def ready(self) -> bool:
        """Whether Triton says that every model is ready."""
        answer = self._ask(self._stub.ServerReady, service_pb2.ServerReadyRequest(), 1.0)
        return answer is not None and bool(answer.ready)

    def load(self, model: str, limit_s: float = 10.0) -> bool:
        """Loads a model, again if it was unloaded; whether it is up."""
        request = service_pb2.RepositoryModelLoadRequest(model_name=model)
        return self._ask(self._stub.RepositoryModelLoad, request, limit_s) is not None

    def unload(self, model: str) -> None:
        self._ask(self._stub.RepositoryModelUnload, service_pb2.RepositoryModelUnloadRequest(model_name=model), 10.0)

    def close(self) -> None:
        self._channel.close()

    def _ask(self, call: Callable[..., Any], request: Any, limit_s: float) -> Any:
        try:
            return call(request, timeout=limit_s)
        except grpc.RpcError:
            return None


class Supervisor:
    """Watches the stages `models` of the Triton with process id `process`, and the gateway, while the `with` lasts.

    stuck_s: a stage that is busy with one request for so long, or gives no sign of life, is loaded again.
    repair: makes again what the stages need on disk, if somebody has removed it. protect: closes what they share to
    other users; stages make it when they start.
    """

    def __init__(
        self,
        process: int,
        models: Collection[str],
        admin: Admin,
        control: Control,
        gateway: GatewayProcess,
        load_limit_s: float,
        stuck_s: float,
        is_running: Callable[[], bool],
        repair: Callable[[], None] = lambda: None,
        protect: Callable[[], None] = lambda: None,
    ) -> None:
        self._process = process
        self._models = frozenset(models)
        self._admin = admin
        self._control = control
        self._gateway = gateway
        self._load_limit_s = load_limit_s
        self._vigil = Vigil(control, stuck_s)
        self._is_running = is_running
        self._repair = repair
        self._protect = protect
        self._stages: dict[str, int] = {}
        """Process id by model, as found last."""
        self._is_away = False
        """Whether a stage was lost and not every one is back."""
        self._epoch = threading.Lock()
        self._over = threading.Event()
        # A gateway that dies must not wait for a stage that is being loaded.
        self._threads = [
            threading.Thread(target=self._watch, args=(look_after,), name=f"supervisor of {name}", daemon=True)
            for name, look_after in (("the gateway", self._look_after_gateway), ("stages", self._look_after_stages))
        ]

    def __enter__(self) -> Self:
        self._gateway.tell(pipe_ready=True)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(STOP_LIMIT_S)

    def drain(self, seconds: float) -> bool:
        """Takes no new sessions, lets the live ones end by themselves for so long, then ends them with an error.

        Returns whether all ended by themselves.
        """
        self._set_phase("draining")
        ended = self._wait_empty(seconds)
        if not ended:
            self._set_phase("closing")
            self._wait_empty(CLOSING_S)
        time.sleep(LAST_ANSWER_S)
        return ended

    def _set_phase(self, phase: str) -> None:
        self._gateway.tell(phase=phase)
        self._gateway.wait_phase(phase, PHASE_LIMIT_S)

    def _wait_empty(self, seconds: float) -> bool:
        """Whether all sessions have ended, at the latest after so long, or when Triton has."""
        return wait_until(lambda: not (self._is_running() and self._gateway.live_sessions), seconds)

    def _watch(self, look_after: Callable[[], None]) -> None:
        while not self._over.wait(WATCH_S):
            try:
                look_after()
            except Exception:  # whatever it was, the next process that dies must be noticed
                log.exception("could not look after the server")

    def _look_after_gateway(self) -> None:
        if self._gateway.is_stuck(GATEWAY_LIMIT_S):
            log.error("the gateway has not reported for %g s; ending it", GATEWAY_LIMIT_S)
            self._gateway.kill()
        if not self._gateway.is_running():
            self._restart_gateway()

    def _look_after_stages(self) -> None:
        self._protect()
        stages = self._find_stages()
        if (model := self._vigil.stuck(stages)) is not None:
            log.error("%s is stuck; ending its process", model)
            with suppress(ProcessLookupError):
                os.kill(stages.pop(model), signal.SIGKILL)
        for model in sorted(self._models - stages.keys()):
            self._reload(model)
        if self._is_away and self._models <= self._find_stages().keys() and self._admin.ready():
            self._is_away = False
            self._gateway.tell(pipe_ready=True)

    def _find_stages(self) -> dict[str, int]:
        """Process id by model of the stages that are alive.

        Looking through all processes of a machine takes milliseconds, so this is done only if a stage is not where it
        was.
        """
        known = {model: number for model, number in self._stages.items() if is_stage(number, model, self._process)}
        self._stages = known if self._models <= known.keys() else living_stages(self._process)
        return dict(self._stages)

    def _restart_gateway(self) -> None:
        """Its sessions are lost with their connections, so the stages drop them."""
        if self._is_over():
            return
        log.warning("the gateway has ended; starting it again")
        self._lose_sessions()
        try:
            self._gateway.start()
        except ServerError as error:
            log.error("the gateway could not be started again (%s); trying once more in %g s", error, RETRY_S)
            self._over.wait(RETRY_S)

    def _lose_sessions(self) -> None:
        """Makes all stages drop the sessions that they have."""
        with self._epoch:
            self._control.advance_reload_epoch()

    def _reload(self, model: str) -> None:
        """Loads a model again whose process is gone. Its sessions are lost, which the gateway tells their callers, and
        the other stages are told while the ensemble is not there: so all sessions before that are dropped, and none
        after it."""
        if self._is_over():
            return
        log.warning("the process of %s is gone; loading it again", model)
        holds_sessions = model != AVATAR_ENCODER
        self._is_away = True
        self._gateway.tell(pipe_ready=False)
        self._gateway.command(lost=model)
        self._admin.unload(model)
        if self._is_over():
            return
        self._repair()
        self._control.forget_beat(model)
        if holds_sessions:
            self._lose_sessions()
        if not self._admin.load(model, self._load_limit_s) and not self._is_over():
            log.error("%s could not be loaded again; trying once more in %g s", model, RETRY_S)
            self._over.wait(RETRY_S)

    def _is_over(self) -> bool:
        return self._over.is_set() or not self._is_running()


class Vigil:
    """Notices stages that are alive and do not work, from the signs of life that they leave in `control`."""

    def __init__(self, control: Control, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s = limit_s
        self._control = control
        self._clock = clock
        self._looked_s = clock()
        self._signs: dict[str, str] = {}
        self._silent_s: dict[str, float] = {}

    def stuck(self, stages: Collection[str]) -> str | None:
        """The stage that has been silent for the longest, if that is too long. Others may only wait for it."""
        now_s = self._clock()
        passed_s = min(now_s - self._looked_s, LONGEST_STEP_S)
        self._looked_s = now_s
        for stage in stages:
            sign = self._control.last_beat(stage)
            is_same = bool(sign) and sign == self._signs.get(stage)
            self._silent_s[stage] = self._silent_s.get(stage, 0.0) + passed_s if is_same else 0.0
            self._signs[stage] = sign
        over = {stage: self._silent_s[stage] / self._patience_s(stage) for stage in stages}
        longest = max(over, key=lambda stage: over[stage], default=None)
        return longest if longest is not None and over[longest] > 1 else None

    def _patience_s(self, stage: str) -> float:
        return self._limit_s * (ENCODER_PATIENCE if stage == AVATAR_ENCODER else 1.0)


def living_stages(triton: int) -> dict[str, int]:
    """Process id by model of the python processes that are alive under the Triton with that process id."""
    numbers = (int(folder.name) for folder in PROCESSES.iterdir() if folder.name.isdecimal())
    models = ((_stage(number, triton), number) for number in numbers)
    return {model: number for model, number in models if model is not None}


def is_stage(number: int, model: str, triton: int) -> bool:
    """Whether the process of that number is alive and serves the model under that Triton."""
    return _stage(number, triton) == model


def _stage(number: int, triton: int) -> str | None:
    """The model, if a process is a living stage of that Triton."""
    process = PROCESSES / str(number)
    try:
        state, parent = process.joinpath("stat").read_bytes().decode(errors="replace").rpartition(")")[2].split()[:2]
        if int(parent) != triton or state not in ALIVE:
            return None
        return model_of(process.joinpath("cmdline").read_bytes().decode(errors="replace").split("\0"))
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return None


def model_of(command: Sequence[str]) -> str | None:
    """The model that a process serves, from its command line: STUB MODEL/VERSION/model.py ..."""
    return Path(command[1]).parents[1].name if command[0].endswith(STUB) and len(command) > 1 else None
