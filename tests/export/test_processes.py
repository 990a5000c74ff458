"""Two processes export what one does; what goes wrong in one of them ends the export, and both."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from live_avatar.errors import CheckpointError, ExportError
from live_avatar.exporter.build import export_artifacts
from live_avatar.exporter.processes import can_have_helper, helper_process, shared
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


def touch(path: str) -> None:
    """Notes the process that did it. The last job waits until the first one has been done."""
    if path.endswith("last"):
        wait_for(Path(path).with_name("first"))
    Path(path).write_text(str(os.getpid()))


def wait_for(path: Path) -> None:
    give_up_s = time.monotonic() + LIMIT_S
    while not path.exists():
        assert time.monotonic() < give_up_s, path
        time.sleep(0.01)


def refuse_last(job: str) -> None:
    if job == "last":
        refuse()


def die_last(job: str) -> None:
    if job == "last":
        die()


def test_a_helper_needs_a_second_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for processors in (1, 2, 3):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, count=processors: set(range(count)))
        found.append(can_have_helper())
    assert found == [False, True, True]


def test_no_helper_where_no_semaphore_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(context: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(multiprocessing.context.BaseContext, "Lock", refused)
    assert not can_have_helper()


def test_both_processes_do_the_jobs_and_each_is_done_once(tmp_path: Path) -> None:
    jobs = [str(tmp_path / name) for name in ("first", "second", "third", "last")]
    with helper_process() as helper:
        done = list(shared(jobs, helper, touch))
    assert sorted(done) == sorted(jobs)
    by_name = {path.name: int(path.read_text()) for path in tmp_path.iterdir()}
    assert by_name["first"] == os.getpid() != by_name["last"]


def test_the_helper_does_several_jobs_while_this_process_does_one(tmp_path: Path) -> None:
    def work(job: str) -> None:
        wait_for(tmp_path / "second")

    class Here(Executor):
        """Does in this process what the helper would."""

        def submit(self, fn: object, /, *arguments: object, **options: object) -> Future[object]:
            (tmp_path / str(arguments[0])).touch()
            future: Future[object] = Future()
            future.set_result(None)
            return future

    assert list(shared(["first", "second", "third"], Here(), work)) == ["third", "second", "first"]


@pytest.mark.slow
def test_a_process_that_dies_ends_the_export_with_a_sentence() -> None:
    message = "one of the 2 processes of the export has died, perhaps for want of memory"
    with pytest.raises(ExportError, match=message), helper_process() as helper:
        list(shared(["first", "second", "last"], helper, die_last))


@pytest.mark.slow
def test_a_process_that_dies_before_its_work_ends_the_export_with_a_sentence() -> None:
    def export() -> None:
        with helper_process() as helper:
            with pytest.raises(BrokenProcessPool):
                helper.submit(die).result(LIMIT_S)
            list(shared(["only"], helper, print))

    with pytest.raises(ExportError, match="one of the 2 processes of the export has died"):
        export()


@pytest.mark.slow
def test_an_error_of_a_process_arrives_as_it_is() -> None:
    with pytest.raises(CheckpointError, match="the file is damaged; fetch it again"), helper_process() as helper:
        list(shared(["first", "second", "last"], helper, refuse_last))


def test_an_interrupt_ends_the_processes_at_once(tmp_path: Path) -> None:
    others = set(multiprocessing.active_children())
    started = tmp_path / "started"

    def interrupted() -> None:
        with helper_process() as helper:
            helper.submit(wait_forever, str(started))
            wait_for(started)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert set(multiprocessing.active_children()) == others


@pytest.mark.parametrize("after_s", [0.5, 1.5])
def test_an_error_while_the_helper_imports_is_all_that_is_said(
    after_s: float, capfd: pytest.CaptureFixture[str]
) -> None:
    def export() -> None:
        with helper_process():
            time.sleep(after_s)
            refuse()

    with pytest.raises(CheckpointError):
        export()
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_two_processes_export_the_same_files(tmp_path: Path, other_artifacts: Artifacts) -> None:
    told: list[str] = []
    with helper_process() as helper:
        made = export_artifacts(open_checkpoint(OTHER), tmp_path / "artifacts", told.append, helper=helper)
    assert sorted(told) == sorted(made.contracts)
    assert made.fingerprint == other_artifacts.fingerprint
    for path in sorted(made.folder.iterdir()):
        assert path.read_bytes() == (other_artifacts.folder / path.name).read_bytes(), path.name


@pytest.mark.slow
def test_a_failed_export_of_two_processes_leaves_nothing(tmp_path: Path) -> None:
    def stop(component: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), helper_process() as helper:
        export_artifacts(open_checkpoint(OTHER), tmp_path / "artifacts", stop, helper=helper)
    assert list(tmp_path.iterdir()) == []
