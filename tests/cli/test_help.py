"""What the commands say of themselves, and that saying it loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest

from live_avatar.cli.main import main
from tests.cli.support import COMMANDS, assert_refused, command, invoke

HEAVY = {"av", "grpc", "numpy", "onnx", "onnxruntime", "torch", "transformers", "tritonclient"}


def modules_after(statement: str) -> set[str]:
    """The top-level modules that a fresh Python has loaded after a statement."""
    show = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", show], check=True, capture_output=True, text=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS)], ids=["live-avatar", *COMMANDS])
def test_help_is_quick(words: list[str]) -> None:
    """It loads nothing heavy; Python lists on stderr what it loads."""
    python, *arguments = command(*words, "--help")
    done = subprocess.run([python, "-X", "importtime", *arguments], capture_output=True, text=True, timeout=60)
    said = done.stderr.splitlines()
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in said}
    assert "click" in loaded
    assert loaded.isdisjoint(HEAVY)
    assert done.returncode == 0
    assert [line for line in said if not line.startswith("import time:")] == []
    assert done.stdout.startswith("Usage: live-avatar ")
    result = invoke(*words, "-h")
    assert result.exit_code == 0, (result.output, result.exception)


def test_the_commands_are_these() -> None:
    assert sorted(main.commands) == sorted(COMMANDS)
    assert invoke("--version").stdout.startswith("live-avatar, version ")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_every_option_has_help(name: str) -> None:
    one = main.commands[name]
    assert one.help
    if isinstance(one, click.Group):
        assert [command.name for command in one.commands.values() if not command.help] == []
        return
    options = [parameter for parameter in one.params if isinstance(parameter, click.Option)]
    assert one.params
    assert [option.name for option in options if not option.help] == []


def test_the_command_line_loads_nothing_heavy() -> None:
    assert modules_after("import live_avatar.cli.main").isdisjoint(HEAVY)


def test_stream_needs_neither_torch_nor_an_engine() -> None:
    loaded = modules_after(
        "import live_avatar.cli.main, live_avatar.cli.demo, live_avatar_client.media, live_avatar_client.video"
    )
    assert loaded.isdisjoint({"export", "onnx", "onnxruntime", "torch", "transformers"})
    assert {"av", "grpc"} <= loaded


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["sing"], "No such command 'sing'; see `live-avatar --help`."),
        (["generate"], "Missing option '--audio' / '--speech'; see `live-avatar generate --help`."),
        (["stream", "--seed", "1.5"], "'--seed': '1.5' is not a valid integer; see `live-avatar stream --help`."),
        (["stream", "--seed", "-1"], "'--seed': -1 is not in the range 0<=x<=9223372036854775807; see"),
        (["generate", "--seed", str(2**63)], "'--seed': 9223372036854775808 is not in the range 0<=x<="),
        (["generate", "--sed", "1"], "No such option '--sed'"),
        (["stream", "--pace", "slow"], "'--pace': 'slow' is not one of 'fast', 'realtime'; see"),
        (["serve", "--grpc-port", "x"], "'--grpc-port': 'x' is not a valid integer; see"),
        (["serve", "--grpc-port", "0"], "'--grpc-port': 0 is not in the range 1<=x<=65535; see"),
        (["export", "--preset", "huge"], "'--preset': 'huge' is not one of 's2v-14b', 'tiny'; see"),
        (["demo", "now"], "Got unexpected extra argument (now); see `live-avatar demo --help`."),
    ],
)
def test_a_misspelt_command_line_is_one_sentence(words: list[str], sentence: str) -> None:
    assert_refused(invoke(*words), sentence)


def test_no_command_shows_the_help() -> None:
    result = invoke()
    assert result.exit_code == 2
    assert "Commands:" in result.stderr


def test_a_full_standard_output_is_one_sentence() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(command("--help"), stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "Error: standard output: No space left on device; use a writable path with free space."
    ]
