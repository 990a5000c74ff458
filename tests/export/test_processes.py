"""Several processes export what one does; what goes wrong in one of them ends the export, and all of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from live_avatar.errors import CheckpointError, ExportError
from live_avatar.exporter.build import export_artifacts
from live_avatar.exporter.processes import possible_processes, worker_processes
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.weights.checkpoint import open_checkpoint
from tests.export.conftest import OTHER

LIMIT_S = 60.0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse() -> None:
    raise CheckpointError("the file is damaged; fetch it again.")


def wait_forever(started: str) -> None:
    Path(started).touch()
    time.sleep(3600)


def test_as_many_processes_as_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2})
    assert [possible_processes(wanted) for wanted in (1, 2, 3, 4)] == [1, 2, 3, 3]


def test_one_process_where_no_semaphore_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(context: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(multiprocessing.context.BaseContext, "Lock", refused)
    assert possible_processes(2) == 1


@pytest.mark.slow
def test_a_process_that_dies_ends_the_export_with_a_sentence() -> None:
    message = "one of the 2 processes of the export has died, perhaps for want of memory"
    with pytest.raises(ExportError, match=message), worker_processes(2) as pool:
        pool.submit(die).result(LIMIT_S)


@pytest.mark.slow
def test_an_error_of_a_process_arrives_as_it_is() -> None:
    with pytest.raises(CheckpointError, match="the file is damaged; fetch it again"), worker_processes(1) as pool:
        pool.submit(refuse).result(LIMIT_S)


def test_an_interrupt_ends_the_processes_at_once(tmp_path: Path) -> None:
    others = set(multiprocessing.active_children())
    started = tmp_path / "started"

    def interrupted() -> None:
        with worker_processes(1) as pool:
            pool.submit(wait_forever, str(started))
            give_up_s = time.monotonic() + LIMIT_S
            while not started.exists():
                assert time.monotonic() < give_up_s
                time.sleep(0.01)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert set(multiprocessing.active_children()) == others


@pytest.mark.slow
def test_two_processes_export_the_same_files(tmp_path: Path, other_artifacts: Artifacts) -> None:
    told: list[str] = []
    made = export_artifacts(open_checkpoint(OTHER), tmp_path / "artifacts", told.append, processes=2)
    assert sorted(told) == sorted(made.contracts)
    assert made.fingerprint == other_artifacts.fingerprint
    for path in sorted(made.folder.iterdir()):
        assert path.read_bytes() == (other_artifacts.folder / path.name).read_bytes(), path.name


@pytest.mark.slow
def test_a_failed_export_of_two_processes_leaves_nothing(tmp_path: Path) -> None:
    def stop(component: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_artifacts(open_checkpoint(OTHER), tmp_path / "artifacts", stop, processes=2)
    assert list(tmp_path.iterdir()) == []
