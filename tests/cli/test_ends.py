"""Ctrl-C, SIGTERM and worse: whatever a command has started and not finished is gone after it."""

from __future__ import annotations

import shutil
import signal
import socket
import sys
import threading
from pathlib import Path

import pytest

from live_avatar import interrupts
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.interrupts import SIGNALS
from live_avatar.serving.server_options import ServerOptions
from tests.cli.support import Running, assert_refused, invoke, run, wait_until

INTERRUPTED = (130, "Interrupted.")
ENDS = pytest.mark.parametrize(
    "number",
    [pytest.param(signal.SIGINT, id="ctrl-c", marks=pytest.mark.slow), pytest.param(signal.SIGTERM, id="sigterm")],
)


def ports(folder: Path) -> list[object]:
    """Options of `serve` for ports that are free."""
    free = ServerOptions(folder).on_free_ports()
    return ["--grpc-port", free.grpc_port, "--http-port", free.http_port, "--metrics-port", free.metrics_port]


def ended(running: Running, *numbers: signal.Signals) -> tuple[int, str]:
    code, said = running.end(*numbers)
    return code, said.strip()


def test_an_interruption_that_was_swallowed_is_raised_again() -> None:
    interrupts.install()
    interrupts.check()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    for number in SIGNALS:
        signal.raise_signal(number)  # nothing: the first is being dealt with
    with pytest.raises(KeyboardInterrupt):
        interrupts.check()
    interrupts.install()
    interrupts.check()


def test_signals_that_come_together_are_one_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    interrupts.install()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    for number in SIGNALS:
        signal.pthread_kill(threading.get_ident(), number)
    with pytest.raises(KeyboardInterrupt):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    signal.raise_signal(signal.SIGINT)  # lets Python look at those that still wait
    assert reported == []


@ENDS
def test_generate(
    tmp_path: Path, started: list[Running], artifacts: Artifacts, inputs: Path, image: Path, number: signal.Signals
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "a.mp4").write_text("before")
    files = ("--output", output / "a.mp4", "--frames-output", output / "a.npy")
    words = ("--audio", inputs / "long.wav", "--image", image, "--artifacts", artifacts.folder)
    running = Running(tmp_path / "temporary", "generate", *words, *files)
    started.append(running)
    running.await_file(output, ".a.mp4.*.part")
    assert ended(running, number, signal.SIGINT) == INTERRUPTED
    assert [path.read_text() for path in output.iterdir()] == ["before"]
    assert running.left() == []


@ENDS
def test_stream(
    tmp_path: Path, started: list[Running], inputs: Path, image: Path, url: str, number: signal.Signals
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    words = ("--url", url, "--pace", "realtime", "--image", image, "--output", output / "a.mp4")
    running = Running(tmp_path / "temporary", "stream", "--audio", inputs / "long.wav", *words)
    started.append(running)
    running.await_file(output, ".a.mp4.*.part")
    assert ended(running, number, signal.SIGTERM) == INTERRUPTED
    assert list(output.iterdir()) == []
    assert running.left() == []
    # The server serves others.
    result = invoke("stream", "--audio", inputs / "short.wav", *words)
    assert result.exit_code == 0, result.stderr


@ENDS
def test_serve(tmp_path: Path, started: list[Running], artifacts: Artifacts, number: signal.Signals) -> None:
    running = Running(tmp_path / "temporary", "serve", "--artifacts", artifacts.folder, *ports(artifacts.folder))
    started.append(running)
    running.await_line("Serving ")
    assert len(running.left()) >= 8  # Triton, and a process for each model
    assert ended(running, number, signal.SIGINT, signal.SIGTERM) == (0, "")
    assert running.left() == []


def test_serve_that_still_starts(tmp_path: Path, started: list[Running], artifacts: Artifacts) -> None:
    running = Running(tmp_path / "temporary", "serve", "--artifacts", artifacts.folder, *ports(artifacts.folder))
    started.append(running)
    wait_until(lambda: any("triton_python_backend_stub" in left for left in running.left()))
    assert ended(running, signal.SIGTERM) == (0, "")
    assert running.left() == []


def test_a_serve_that_is_killed_takes_its_server_along(
    tmp_path: Path, started: list[Running], artifacts: Artifacts
) -> None:
    running = Running(tmp_path / "temporary", "serve", "--artifacts", artifacts.folder, *ports(artifacts.folder))
    started.append(running)
    running.await_line("Serving ")
    assert ended(running, signal.SIGKILL) == (-signal.SIGKILL, "")
    wait_until(lambda: not running.left())


def test_a_server_that_dies_ends_serve(tmp_path: Path, started: list[Running], artifacts: Artifacts) -> None:
    running = Running(tmp_path / "temporary", "serve", "--artifacts", artifacts.folder, *ports(artifacts.folder))
    started.append(running)
    running.await_line("Serving ")
    running.kill_server()
    code, said = running.wait()
    assert code == 2
    assert said.startswith("Error: Triton ended by itself with code -9")
    assert "Traceback" not in said
    assert running.left() == []


@pytest.mark.parametrize("phase", ["starting", pytest.param("streaming", marks=pytest.mark.slow)])
def test_demo(tmp_path: Path, started: list[Running], artifacts: Artifacts, phase: str) -> None:
    output = tmp_path / "out"
    words = ("--artifacts", artifacts.folder, "--output", output / "a.mp4", "--trace", output / "a.json")
    running = Running(tmp_path / "temporary", "demo", *words)
    started.append(running)
    running.await_line("Starting Triton")
    if phase == "streaming":
        running.await_file(output, ".a.mp4.*.part")
    assert ended(running, signal.SIGINT, signal.SIGINT, signal.SIGTERM) == INTERRUPTED
    assert list(output.iterdir()) == []
    assert running.left() == []


@pytest.mark.slow
def test_export(tmp_path: Path, started: list[Running]) -> None:
    output = tmp_path / "out"
    running = Running(tmp_path / "temporary", "export", "--output", output / "tiny")
    started.append(running)
    running.await_file(output, ".export-*/new/*.onnx")
    assert ended(running, signal.SIGTERM, signal.SIGINT) == INTERRUPTED
    assert list(output.iterdir()) == []
    assert running.left() == []


@pytest.mark.parametrize("option", ["--grpc-port", "--http-port", "--metrics-port"])
def test_a_port_in_use(artifacts: Artifacts, option: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = invoke("serve", "--artifacts", artifacts.folder, *ports(artifacts.folder), option, port)
    sentence = f"cannot listen on 127.0.0.1:{port} (Address already in use); choose another {option} or --address."
    assert_refused(result, sentence)


def test_wishes_that_no_server_fulfils(tmp_path: Path, artifacts: Artifacts) -> None:
    (tmp_path / "file").touch()
    for words, sentence in (
        (("--profile", "h1000"), "there is no profile 'h1000'; choose one of cpu"),
        (("--profile", "../cpu"), "there is no profile '../cpu'; choose one of cpu"),
        (("--address", "no.such.host.invalid"), "is no address to listen on"),
        (("--grpc-port", "9000", "--http-port", "9000"), "two of these are the same; give each a port of its own."),
        (("--trace", tmp_path / "file"), f"cannot write to {tmp_path / 'file'} (File exists); choose another --trace."),
        (("--profile", tmp_path / "none.toml"), f"cannot read the profile {tmp_path / 'none.toml'} (No such file or"),
    ):
        assert_refused(invoke("serve", "--artifacts", artifacts.folder, *ports(artifacts.folder), *words), sentence)


def test_a_model_that_does_not_load(tmp_path: Path, artifacts: Artifacts) -> None:
    """The sentence says which, and why, and Triton's log is not poured out."""
    copy = shutil.copytree(artifacts.folder, tmp_path / "copy")
    graph = copy / "dit.onnx"
    graph.write_bytes(bytes(graph.stat().st_size))
    result = run("serve", "--artifacts", copy, *ports(copy))
    assert result.returncode == 2
    assert "failed to load 'dit_step_" in result.stderr
    assert "export the artifacts again" in result.stderr
    assert "Traceback" not in result.stderr
