"""What the supervisor sees of processes and hears from Triton, whatever others are called and however it answers."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from live_avatar.serving.control import Control
from live_avatar.serving.supervisor import Admin, living_stages, model_of

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
        ({}, {"dit_step_2"}),
        ({"state": "Z"}, set()),
        ({"parent": 1}, set()),
        ({"name": b"half a letter \xc3"}, {"dit_step_2"}),
        ({"name": b"(odd) name)"}, {"dit_step_2"}),
    ],
)
def test_a_stage_is_known_by_its_parent_state_and_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], seen: set[str]
) -> None:
    process(tmp_path / "99", **change)  # type: ignore[arg-type]
    (tmp_path / "100").mkdir()  # ended while we looked
    (tmp_path / "uptime").touch()
    monkeypatch.setattr("live_avatar.serving.supervisor.PROCESSES", tmp_path)
    assert living_stages(TRITON) == seen


def test_other_commands_are_no_models() -> None:
    assert model_of(["/b/triton_python_backend_stub", "/m/avatar_encoder/1/model.py"]) == "avatar_encoder"
    assert model_of(["/b/triton_python_backend_stub"]) is None
    assert model_of(["python3", "/m/avatar_encoder/1/model.py"]) is None
    assert model_of([""]) is None


@contextmanager
def answering(words: bytes) -> Iterator[Admin]:
    """A server that says the same to everybody."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(words)

        thread = threading.Thread(target=answer)
        thread.start()
        yield Admin(f"http://127.0.0.1:{server.getsockname()[1]}", "secret")
        thread.join()


@pytest.mark.parametrize(
    ("words", "ready"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", True),
        (b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", False),
        (b"no HTTP at all\r\n", False),
        (b"", False),
    ],
)
def test_triton_is_ready_if_it_says_so(words: bytes, ready: bool) -> None:
    with answering(words) as admin:
        assert admin.ready() == ready


def test_control_counts_reloads_for_everyone_who_has_the_folder(tmp_path: Path) -> None:
    control = Control(tmp_path)
    assert control.reload_epoch == 0
    control.advance_reload_epoch()
    assert Control(tmp_path).reload_epoch == 1
    alone = Control(None)
    alone.advance_reload_epoch()
    assert alone.reload_epoch == 0
