"""What the supervisor sees of processes and hears from Triton, whatever others are called and however it answers."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from live_avatar.serving.control import Control
from live_avatar.serving.gateway_process import GatewayProcess
from live_avatar.serving.gateway_settings import triton_target
from live_avatar.serving.supervisor import Admin, Supervisor, Vigil, living_stages, model_of

TRITON = 77


def process(folder: Path, state: str = "S", parent: int = TRITON, name: bytes = b"triton_python_b") -> Path:
    """A folder of /proc, as far as it is looked at."""
    folder.mkdir()
    folder.joinpath("stat").write_bytes(b"99 (" + name + f") {state} {parent} 0 0".encode())
    folder.joinpath("cmdline").write_bytes(b"/b/triton_python_backend_stub\0/m/dit_step_2/1/model.py\0region\0")
    return folder


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({}, {"dit_step_2": 99}),
        ({"state": "Z"}, {}),
        ({"parent": 1}, {}),
        ({"name": b"half a letter \xc3"}, {"dit_step_2": 99}),
        ({"name": b"(odd) name)"}, {"dit_step_2": 99}),
    ],
)
def test_a_stage_is_known_by_its_parent_state_and_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], seen: dict[str, int]
) -> None:
    process(tmp_path / "99", **change)  # type: ignore[arg-type]
    (tmp_path / "100").mkdir()  # ended while we looked
    (tmp_path / "uptime").touch()
    monkeypatch.setattr("live_avatar.serving.supervisor.PROCESSES", tmp_path)
    assert living_stages(TRITON) == seen


def test_a_process_that_cannot_be_looked_at_does_not_count_as_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a free file descriptor; a stage that counts as gone is loaded again, and all sessions are lost."""
    process(tmp_path / "99")

    def full(path: Path) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("live_avatar.serving.supervisor.PROCESSES", tmp_path)
    monkeypatch.setattr(Path, "read_bytes", full)
    with pytest.raises(OSError, match="Too many open files"):
        living_stages(TRITON)


def test_all_processes_are_looked_at_only_when_a_stage_is_not_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("live_avatar.serving.supervisor.PROCESSES", tmp_path / "proc")
    (tmp_path / "proc").mkdir()
    lists = []
    monkeypatch.setattr(
        Path, "iterdir", lambda folder: lists.append(folder) or map(folder.joinpath, os.listdir(folder))
    )
    supervisor = supervisor_of(Gateway(0), tmp_path, models=["dit_step_2"])
    assert (supervisor._find_stages(), len(lists)) == ({}, 1)
    first = process(tmp_path / "proc" / "99")
    assert (supervisor._find_stages(), len(lists)) == ({"dit_step_2": 99}, 2)
    assert (supervisor._find_stages(), len(lists)) == ({"dit_step_2": 99}, 2)
    shutil.rmtree(first)
    process(tmp_path / "proc" / "101")
    assert (supervisor._find_stages(), len(lists)) == ({"dit_step_2": 101}, 3)


def test_other_commands_are_no_models() -> None:
    assert model_of(["/b/triton_python_backend_stub", "/m/avatar_encoder/1/model.py"]) == "avatar_encoder"
    assert model_of(["/b/triton_python_backend_stub"]) is None
    assert model_of(["python3", "/m/avatar_encoder/1/model.py"]) is None
    assert model_of([""]) is None


class Answers(service_pb2_grpc.GRPCInferenceServiceServicer):
    """A Triton that says whether it is ready, or fails."""

    def __init__(self, ready: bool | None) -> None:
        self._ready = ready

    def ServerReady(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802 - its name in the service
        if self._ready is None:
            context.abort(grpc.StatusCode.INTERNAL, "broken")
        return service_pb2.ServerReadyResponse(ready=self._ready)


@pytest.mark.parametrize(("answer", "ready"), [(True, True), (False, False), (None, False)])
def test_triton_is_ready_if_it_says_so(tmp_path: Path, answer: bool | None, ready: bool) -> None:
    """Over the Unix socket whose name Triton makes of its address and its port."""
    target = triton_target(tmp_path)
    server = grpc.server(ThreadPoolExecutor(1))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Answers(answer), server)
    server.add_insecure_port(target)
    server.start()
    admin = Admin(target)
    try:
        assert admin.ready() == ready
    finally:
        admin.close()
        server.stop(None)


def test_a_triton_that_is_not_there_is_not_ready(tmp_path: Path) -> None:
    admin = Admin(triton_target(tmp_path))
    assert not admin.ready()
    admin.close()


class Gateway(GatewayProcess):
    """Keeps the commands, and has as many live sessions as the test says."""

    def __init__(self, live: int) -> None:
        self.live = live
        self.commands: list[dict[str, object]] = []

    @property
    def live_sessions(self) -> int:
        return self.live

    def tell(self, **state: object) -> None:
        self.commands.append(state)

    def wait_phase(self, phase: str, limit_s: float) -> None:
        assert self.commands[-1] == {"phase": phase}


def supervisor_of(gateway: Gateway, folder: Path, is_running: bool = True, models: Sequence[str] = ()) -> Supervisor:
    admin = Admin(triton_target(folder))
    return Supervisor(TRITON, models, admin, Control(folder), gateway, 1.0, 1.0, lambda: is_running)


def test_a_drain_ends_when_the_sessions_have(tmp_path: Path) -> None:
    gateway = Gateway(0)
    assert supervisor_of(gateway, tmp_path).drain(600.0)
    assert gateway.commands == [{"phase": "draining"}]


def test_a_drain_ends_the_sessions_that_stay(tmp_path: Path) -> None:
    gateway = Gateway(1)
    assert not supervisor_of(gateway, tmp_path).drain(0.1)
    assert gateway.commands == [{"phase": "draining"}, {"phase": "closing"}]


def test_a_drain_ends_with_triton(tmp_path: Path) -> None:
    gateway = Gateway(1)
    began_s = time.monotonic()
    supervisor_of(gateway, tmp_path, is_running=False).drain(600.0)
    assert time.monotonic() - began_s < 300.0


def test_the_epoch_is_seen_by_all_who_have_the_folder(tmp_path: Path) -> None:
    control = Control(tmp_path)
    assert control.reload_epoch == 0
    for epoch in (1, 2):
        control.advance_reload_epoch()
        assert (control.reload_epoch, Control(tmp_path).reload_epoch) == (epoch, epoch)
    alone = Control(None)
    alone.advance_reload_epoch()
    assert alone.reload_epoch == 0


def test_a_phase_is_waited_for_so_that_live_sessions_are_counted_since_then(tmp_path: Path) -> None:
    gateway = GatewayProcess(cast(Any, None), tmp_path, print)
    gateway._process = running = cast(Any, object())
    gateway._note(running, {"phase": "serving", "live": 0})
    threading.Timer(0.2, gateway._note, (running, {"phase": "draining", "live": 1})).start()
    gateway.wait_phase("draining", 600.0)
    assert gateway.live_sessions == 1


def test_a_gateway_that_has_ended_is_not_waited_for(tmp_path: Path) -> None:
    gateway = GatewayProcess(cast(Any, None), tmp_path, print)
    gateway._process = running = cast(Any, object())
    gateway._note(running, {"ended": True, "live": 0})
    began_s = time.monotonic()
    gateway.wait_phase("draining", 600.0)
    assert time.monotonic() - began_s < 300.0


def test_what_a_library_prints_in_the_gateway_is_no_report(tmp_path: Path) -> None:
    gateway = GatewayProcess(cast(Any, None), tmp_path, print)
    gateway._process = running = cast(Any, SimpleNamespace(stdout=BytesIO(b'words\n{"phase": "draining"}\n')))
    gateway._read_reports(running)
    assert gateway._state == {"phase": "draining", "ended": True, "ready": False, "live": 0}


class Moment:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def pass_(self, seconds: float) -> None:
        self.now_s += seconds


def stuck_after(vigil: Vigil, clock: Moment, stages: list[str], seconds: int, step_s: float = 0.25) -> str | None:
    found = None
    for _ in range(round(seconds / step_s)):
        clock.pass_(step_s)
        found = found or vigil.stuck(stages)
    return found


def test_a_stage_is_stuck_when_its_sign_stays_the_same(tmp_path: Path) -> None:
    control, clock = Control(tmp_path), Moment()
    vigil = Vigil(control, 10.0, clock)
    assert stuck_after(vigil, clock, ["dit_step_1"], 60) is None, "a stage that has given no sign is being loaded"
    control.beat("dit_step_1", 1.0)
    assert stuck_after(vigil, clock, ["dit_step_1"], 9) is None
    control.beat("dit_step_1", 2.0)
    assert stuck_after(vigil, clock, ["dit_step_1"], 9) is None
    assert stuck_after(vigil, clock, ["dit_step_1"], 3) == "dit_step_1"
    control.forget_beat("dit_step_1")
    assert stuck_after(vigil, clock, ["dit_step_1"], 60) is None


def test_of_two_stages_the_one_that_the_other_waits_for_is_stuck(tmp_path: Path) -> None:
    control, clock = Control(tmp_path), Moment()
    vigil = Vigil(control, 10.0, clock)
    control.beat("dit_step_2", 1.0)
    assert stuck_after(vigil, clock, ["conditioning", "dit_step_2"], 2) is None
    control.beat("conditioning", 1.0)
    assert stuck_after(vigil, clock, ["conditioning", "dit_step_2"], 30) == "dit_step_2"


def test_the_encoder_which_has_the_lowest_priority_may_take_longer(tmp_path: Path) -> None:
    control, clock = Control(tmp_path), Moment()
    vigil = Vigil(control, 10.0, clock)
    control.beat("avatar_encoder", 1.0)
    assert stuck_after(vigil, clock, ["avatar_encoder"], 45) is None
    assert stuck_after(vigil, clock, ["avatar_encoder"], 10) == "avatar_encoder"


def test_time_in_which_the_supervisor_was_stopped_too_does_not_count(tmp_path: Path) -> None:
    """A container that was paused."""
    control, clock = Control(tmp_path), Moment()
    vigil = Vigil(control, 10.0, clock)
    control.beat("dit_step_1", 1.0)
    vigil.stuck(["dit_step_1"])
    clock.pass_(3600.0)
    assert vigil.stuck(["dit_step_1"]) is None


def test_a_sign_needs_no_folder(tmp_path: Path) -> None:
    """A cleaner may have removed it; a stage must go on."""
    for control in (Control(tmp_path / "gone"), Control(None)):
        control.beat("dit_step_1", 1.0)
        control.forget_beat("dit_step_1")
        assert control.last_beat("dit_step_1") == ""
