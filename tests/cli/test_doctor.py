"""`live-avatar doctor`: what it says of a real server, of one that is not there, and its exit codes."""

from __future__ import annotations

import json
import re
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from live_avatar.cli.doctor import as_json, as_lines, exit_code
from live_avatar_client.status import KeyState, ServerStatus
from tests.cli.support import assert_refused, invoke
from tests.support.status import READY, SERVED

UNKNOWN = replace(READY, **dict.fromkeys(SERVED))
LINES = [
    "server      localhost:8001, version 0.1.0",
    "alive       yes",
    "ready       yes",
    "serves      preset tiny, profile cpu, artifacts 0123abcd",
    "sessions    3 of 4 free",
    "round trip  1.2 ms",
    "TLS         no",
    "API key     not needed",
]


def test_a_ready_server(url: str):
    result = invoke("doctor", url)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"server      {url}, version ")
    assert lines[1:3] == LINES[1:3]
    assert re.fullmatch(r"serves      preset tiny, profile cpu, artifacts \w+", lines[3])
    assert re.fullmatch(r"sessions    [1-9]\d* of [1-9]\d* free", lines[4])
    assert re.fullmatch(r"round trip  \d+\.\d ms", lines[5])
    assert lines[6:] == LINES[6:]


def test_a_ready_server_for_scripts(url: str):
    result = invoke("doctor", url, "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    shown = {"url": url, "live": True, "ready": True, "tls": False, "key": "not needed", "draining": False}
    assert said.items() >= (shown | {"preset": "tiny", "profile": "cpu"}).items()
    assert said["free_sessions"] == said["max_sessions"] - said["live_sessions"] > 0
    assert 0 < said["round_trip_s"] < 60


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_nobody_there(options: tuple[str, ...]):
    with socket.socket() as unused:  # bound, and not listening
        unused.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{unused.getsockname()[1]}"
        assert_refused(invoke("doctor", nobody, *options), f"no server answered at {nobody}", "check that it runs")


def test_options_that_cannot_be_used(tmp_path: Path):
    empty = tmp_path / "empty"
    empty.touch()
    for arguments, words in {
        (): "Missing argument 'URL'",
        ("nowhere",): "'nowhere' is not host:port",
        ("localhost:1", "--api-key-file", empty): f"{empty} holds a key of 0 characters",
        ("localhost:1", "--api-key-file", tmp_path / "no"): f"{tmp_path / 'no'}: the key cannot be read",
        ("localhost:1", "--tls-ca", empty): f"'{empty}' has no -----BEGIN line",
        ("localhost:1", "--tls-ca", tmp_path / "no"): f"'{tmp_path / 'no'}' cannot be read",
        ("localhost:1", "--tls-certificate", empty): "but no private_key",
    }.items():
        assert_refused(invoke("doctor", *arguments), words)


def test_the_help_has_the_exit_codes():
    said = " ".join(invoke("doctor", "--help").stdout.split())
    for words in ("Exit code 0", "1:", "2:"):
        assert words in said


@pytest.mark.parametrize(
    ("status", "code", "lines"),
    [
        (READY, 0, {}),
        (replace(READY, tls=True, key=KeyState.ACCEPTED), 0, {6: "TLS         yes", 7: "API key     accepted"}),
        (replace(READY, live_sessions=4), 1, {4: "sessions    0 of 4 free"}),
        (replace(READY, ready=False), 1, {2: "ready       no"}),
        (
            replace(READY, ready=False, draining=True),
            1,
            {2: "ready       no, it is shutting down", 4: "sessions    0 of 4 free"},
        ),
        # draining has begun, readiness is about to end
        (
            replace(READY, draining=True),
            1,
            {2: "ready       yes, it is shutting down", 4: "sessions    0 of 4 free"},
        ),
    ],
)
def test_what_is_said_and_the_exit_code(status: ServerStatus, code: int, lines: dict[int, str]):
    assert as_lines(status) == [lines.get(number, line) for number, line in enumerate(LINES)]
    assert exit_code(status) == code


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (KeyState.MISSING, "missing: the server expects one; give --api-key-file"),
        (KeyState.REFUSED, "refused: the server expects a different key than that of --api-key-file"),
        (KeyState.NOT_NEEDED, "not needed"),
    ],
)
def test_what_is_not_known_is_said(key: KeyState, words: str):
    status = replace(UNKNOWN, key=key)
    assert as_lines(status) == [
        "server      localhost:8001",
        *LINES[1:3],
        "serves      not known",
        "sessions    not known",
        *LINES[5:7],
        f"API key     {words}",
    ]
    assert exit_code(status) == 1
    said = json.loads(as_json(status))
    assert (said["key"], said["preset"], said["free_sessions"]) == (key.value, None, None)
