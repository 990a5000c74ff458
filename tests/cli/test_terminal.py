"""What the commands print: text of servers, files and options is printable, and warnings are sentences."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from live_avatar.cli.doctor import as_lines
from live_avatar.cli.options import listening_address
from live_avatar.cli.terminal import say
from live_avatar_client import base
from live_avatar_client.testing import SAMPLE_IMAGE, FakeAvatarServer
from tests.cli.support import assert_refused, command, invoke, tone, write_audio
from tests.support.status import READY

ATTACK = "\x1b]0;owned\x07\x1b[2J\rError: \u202eall is well"
SHOWN = r"\x1b]0;owned\x07\x1b[2J\rError: \u202eall is well"
KEY = "0123456789abcdef"


@pytest.fixture
def files(tmp_path: Path) -> tuple[object, ...]:
    """The options of `stream` with good inputs, without a server."""
    write_audio(tmp_path / "a.wav", tone(0.1), "pcm_s16le")
    (tmp_path / "a.png").write_bytes(SAMPLE_IMAGE)
    return ("--audio", tmp_path / "a.wav", "--image", tmp_path / "a.png", "--output", tmp_path / "a.mp4")


def test_an_error_of_a_server_is_printable(files: tuple[object, ...]) -> None:
    with FakeAvatarServer(refuse=ATTACK) as server:
        assert_refused(invoke("stream", "--url", server.url, *files), f"the server refused the session: {SHOWN}")


@pytest.mark.parametrize(
    "words",
    [(ATTACK,), ("stream", "--pace", ATTACK), ("doctor", ATTACK), ("stream", "--image", ATTACK), (f"--{ATTACK}",)],
)
def test_an_error_about_an_option_is_printable(files: tuple[object, ...], words: tuple[object, ...]) -> None:
    options = files if words[0] == "stream" else ()
    result = invoke(*words[:1], *options, *words[1:])
    assert result.exit_code == 2
    assert all(line.isprintable() for line in result.stderr.split("\n"))
    assert "owned" in result.stderr


def test_names_of_files_are_printable(files: tuple[object, ...], tmp_path: Path) -> None:
    output = tmp_path / (os.fsdecode(b"\xff\xfe") + "\x1b[2J.mp4")
    with FakeAvatarServer() as server:
        result = invoke("stream", "--url", server.url, *files, "--output", output)
    assert result.exit_code == 0, result.stderr
    assert r"\udcff\udcfe\x1b[2J.mp4 (3 frames)." in result.stdout
    assert output.exists()


def test_a_terminal_without_the_letters(files: tuple[object, ...], tmp_path: Path) -> None:
    with FakeAvatarServer() as server:
        done = subprocess.run(
            command("stream", "--url", server.url, *files, "--output", tmp_path / "видео.mp4"),
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 0, done.stderr
    assert r"\u0432\u0438\u0434\u0435\u043e.mp4" in done.stdout
    assert (tmp_path / "видео.mp4").exists()


def test_the_status_of_a_server_is_printable(capsys: pytest.CaptureFixture[str]) -> None:
    say("\n".join(as_lines(READY)).replace("tiny", ATTACK))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert lines[3] == f"serves      preset {SHOWN}, profile cpu, artifacts 0123abcd"


def test_a_warning_is_a_sentence(files: tuple[object, ...], tmp_path: Path) -> None:
    write_audio(tmp_path / "a.wav", np.zeros(1_600), "pcm_s16le")
    with FakeAvatarServer() as server:
        result = invoke("stream", "--url", server.url, *files)
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        f"Warning: the speech {str(tmp_path / 'a.wav')!r} is digitally silent in its audio stream 1 of 1; the mouth "
        "will not move."
    ]


@pytest.mark.parametrize("subject", ["stream", "doctor"])
def test_a_key_in_plain_text_is_warned_of(
    files: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subject: str
) -> None:
    (tmp_path / "key").write_text(KEY)
    with FakeAvatarServer(api_key=KEY) as server:
        address = ("--url", server.url, *files) if subject == "stream" else (server.url,)
        quiet = invoke(subject, *address, "--api-key-file", tmp_path / "key")
        monkeypatch.setattr(base, "is_loopback", lambda url: False)
        result = invoke(subject, *address, "--api-key-file", tmp_path / "key")
    assert "Warning" not in quiet.stderr
    assert result.stderr.startswith(f"Warning: the API key goes to {server.url} as plain text, so that everybody on")
    assert result.stderr.count("Warning") == 1
    assert KEY not in result.stderr


@pytest.mark.parametrize(
    ("value", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "0.0.0.0"),
        ("localhost", "127.0.0.1"),
        ("::1", "::1"),
        ("[::1]", "::1"),
        ("0:0:0:0:0:0:0:1", "::1"),
        ("::", "::"),
    ],
)
def test_the_address_to_listen_on(value: str, address: str) -> None:
    assert listening_address(None, None, value) == address  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "value", ["", "no.such.host.invalid", "127.0.0.1:8001", "a b", "a" * 70, "\x1b", "http://here"]
)
def test_what_nobody_listens_on(tmp_path: Path, value: str) -> None:
    result = invoke("serve", "--artifacts", tmp_path, "--address", value)
    assert_refused(result, "'--address': ", " is no address to listen on (", "); give one such as 127.0.0.1; see")
