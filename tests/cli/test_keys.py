"""`live-avatar keys`."""

from __future__ import annotations

from pathlib import Path

from live_avatar.gateway.keys import KeyRing
from tests.cli.support import assert_refused, invoke


def test_a_key_is_printed_once_and_its_caller_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    added = invoke("keys", "add", path, "alice")
    assert (added.exit_code, added.stderr) == (0, "")
    (key,) = added.stdout.splitlines()
    assert KeyRing.from_file(path).caller(key) == "alice"
    assert invoke("keys", "add", path, "bob").exit_code == 0
    assert invoke("keys", "list", path).stdout == "alice\nbob\n"
    removed = invoke("keys", "remove", path, "alice")
    assert (removed.exit_code, removed.output) == (0, "")
    assert invoke("keys", "list", path).stdout == "bob\n"


def test_faults_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    assert_refused(invoke("keys", "list", path), f"{path}: the keys cannot be read (No such file or directory)")
    assert_refused(invoke("keys", "add", path, "a b"), "'a b' cannot be a caller's name; expected 1 to 64 of")
    assert_refused(invoke("keys", "add", tmp_path / "absent" / "keys", "alice"), "absent: No such file or directory")
    assert_refused(invoke("keys", "remove", path), "Missing argument 'NAME'; see `live-avatar keys remove --help`.")
