"""The file of API keys: what it may hold, who is who, and how it changes under a running gateway."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from live_avatar.errors import ServerError
from live_avatar.gateway.keys import KeyRing, add_key, key_names, read_keys, remove_key

KEY, OTHER = "0123456789abcdef-alice", "0123456789abcdef-bob"


def line(name: str, key: str) -> str:
    return f"{name} sha256:{hashlib.sha256(key.encode()).hexdigest()}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys"


@pytest.fixture
def ring(path: Path) -> KeyRing:
    name, upper = "bob.2", hashlib.sha256(OTHER.encode()).hexdigest().upper()
    path.write_text(f"# callers\n\n{line('alice', KEY)}\n  # another\n{name} sha256:{upper}\n")
    return KeyRing.from_file(path)


def test_without_a_file_everybody_is_allowed() -> None:
    ring = KeyRing()
    assert ring.caller(None) == ring.caller(KEY) == "anonymous"
    assert ring.reload_if_changed() is None
    assert ring.names == frozenset()


def test_every_caller_has_a_name(ring: KeyRing) -> None:
    assert ring.caller(KEY) == "alice"
    assert ring.caller(OTHER) == "bob.2"
    assert ring.names == {"alice", "bob.2"}


@pytest.mark.parametrize("key", [None, "", "alice", KEY[:-1], f"{KEY} ", KEY.upper(), "ä", "\udcff", "x" * 100_000])
def test_nobody_else_is_allowed(ring: KeyRing, key: str | None) -> None:
    assert ring.caller(key) is None


def test_a_hash_is_no_key(ring: KeyRing) -> None:
    assert ring.caller(hashlib.sha256(KEY.encode()).hexdigest()) is None


@pytest.mark.parametrize("text", [KEY, f"{KEY}\n", f"{KEY}\r\n", "#0123456789abcdef"])
def test_a_file_with_one_plain_key_has_a_caller_called_default(path: Path, text: str) -> None:
    path.write_bytes(text.encode())
    ring = KeyRing.from_file(path)
    assert ring.caller(text.strip()) == "default"
    assert ring.caller(None) is None
    assert ring.names == {"default"}


def test_a_file_with_comments_only_allows_nobody(path: Path) -> None:
    path.write_text("# no callers yet\n")
    ring = KeyRing.from_file(path)
    assert ring.caller(None) is None
    assert ring.caller("") is None
    assert ring.names == frozenset()


NO_KEY = r"line {} is no key; expected NAME sha256:HEX, with 64 hexadecimal digits and a name of 1 to 64 of "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"keys holds a key of 0 characters; expected one line with a key of 16 to 256"),
        ("short", r"keys holds a key of 5 characters; expected one line with a key of 16 to 256"),
        (f"{KEY}\n{OTHER}\n", NO_KEY.format(1)),
        (f"{line('alice', KEY)}\n{OTHER}\n", NO_KEY.format(2)),
        (f"alice {KEY}", NO_KEY.format(1)),
        (line("alice", KEY)[:-1], NO_KEY.format(1)),
        (line("al/ice", KEY), NO_KEY.format(1)),
        (line("a" * 65, KEY), NO_KEY.format(1)),
        (line("anonymous", KEY), NO_KEY.format(1)),
        (f"{line('a', KEY)}\n#\n{line('a', OTHER)}", r"lines 1 and 3 have the same name; rename or remove one\."),
        (f"{line('a', KEY)}\n{line('b', KEY)}", r"lines 1 and 2 have the same key; give each its own\."),
        (f"{line('a', KEY)}\n\udcff", NO_KEY.format(2)),
        ("# x\n" * 300_000, r"keys has more than 1048576 bytes, so it is no file of keys; give another one\."),
    ],
    ids=range(13),
)
def test_a_file_that_cannot_be_used_is_refused_without_telling_a_key(path: Path, text: str, message: str) -> None:
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ServerError, match=message) as refused:
        KeyRing.from_file(path)
    said = str(refused.value)
    assert all(secret not in said for secret in (KEY, OTHER, hashlib.sha256(KEY.encode()).hexdigest()))


def test_a_file_that_is_not_there_is_refused(path: Path) -> None:
    with pytest.raises(ServerError, match=r"keys: the keys cannot be read \(No such file or directory\); give a file"):
        KeyRing.from_file(path)


def test_a_changed_file_is_read_again(ring: KeyRing, path: Path) -> None:
    assert ring.reload_if_changed() is None
    path.write_text(line("carol", OTHER))
    assert ring.caller(OTHER) == "bob.2"
    assert ring.reload_if_changed() is None
    assert ring.caller(OTHER) == "carol"
    assert ring.caller(KEY) is None


def test_a_bad_file_leaves_the_keys_and_is_told_once(ring: KeyRing, path: Path) -> None:
    path.write_text("alice: secret\n")
    assert "line 1 is no key" in str(ring.reload_if_changed())
    assert ring.reload_if_changed() is None
    assert ring.caller(KEY) == "alice"
    path.unlink()
    assert "cannot be read (No such file or directory)" in str(ring.reload_if_changed())
    assert ring.reload_if_changed() is None
    assert ring.caller(KEY) == "alice"
    path.write_text(line("carol", OTHER))
    assert ring.reload_if_changed() is None
    assert (ring.caller(OTHER), ring.caller(KEY)) == ("carol", None)


def test_a_file_behind_a_link_that_moves_is_read_again(tmp_path: Path) -> None:
    """As Kubernetes changes a mounted secret."""
    for folder, name in (("1", "alice"), ("2", "bob")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "keys").write_text(line(name, KEY))
    (tmp_path / "data").symlink_to("1")
    (tmp_path / "keys").symlink_to("data/keys")
    ring = KeyRing.from_file(tmp_path / "keys")
    (tmp_path / "new").symlink_to("2")
    (tmp_path / "new").replace(tmp_path / "data")
    assert ring.reload_if_changed() is None
    assert ring.caller(KEY) == "bob"


def test_an_added_key_works_and_only_its_hash_is_kept(path: Path) -> None:
    keys = {name: add_key(path, name) for name in ("alice", "bob")}
    ring = KeyRing.from_file(path)
    assert {name: ring.caller(key) for name, key in keys.items()} == {"alice": "alice", "bob": "bob"}
    assert len(set(keys.values())) == 2
    assert all(len(key) >= 43 and key not in path.read_text() for key in keys.values())
    assert path.stat().st_mode & 0o777 == 0o600
    assert key_names(path) == ["alice", "bob"]
    assert [found.name for found in path.parent.iterdir()] == ["keys"]


def test_a_removed_key_works_no_longer(path: Path) -> None:
    keys = {name: add_key(path, name) for name in ("alice", "bob")}
    ring = KeyRing.from_file(path)
    for name, left in (("alice", {"bob"}), ("bob", set())):
        remove_key(path, name)
        assert ring.reload_if_changed() is None
        assert ring.caller(keys[name]) is None
        assert ring.names == left


def test_the_last_line_of_a_hand_made_file_may_be_removed(path: Path) -> None:
    path.write_text(line("alice", KEY))
    remove_key(path, "alice")
    assert key_names(path) == []


def test_comments_and_the_files_mode_stay(ring: KeyRing, path: Path) -> None:
    path.chmod(0o640)
    add_key(path, "carol")
    remove_key(path, "alice")
    assert path.stat().st_mode & 0o777 == 0o640
    assert [text.partition(" sha256:")[0] for text in path.read_text().splitlines()] == [
        "# callers",
        "",
        "  # another",
        "bob.2",
        "carol",
    ]
    assert ring.reload_if_changed() is None
    assert ring.names == {"bob.2", "carol"}


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/keys")
    add_key(tmp_path / "link", "alice")
    assert (tmp_path / "link").is_symlink()
    assert key_names(tmp_path / "folder" / "keys") == ["alice"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
def test_the_files_owner_stays(path: Path) -> None:
    add_key(path, "alice")
    os.chown(path, 1234, 1235)
    add_key(path, "bob")
    assert (path.stat().st_uid, path.stat().st_gid, path.stat().st_mode & 0o777) == (1234, 1235, 0o600)


@pytest.mark.parametrize("name", ["", "a b", "a" * 65, "ä", "a\n", "#a", "anonymous"])
def test_a_name_that_is_not_allowed_is_refused(path: Path, name: str) -> None:
    with pytest.raises(ServerError, match=r" cannot be a caller's name; expected 1 to 64 of A-Z, a-z, 0-9, "):
        add_key(path, name)
    assert not path.exists()


def test_a_name_that_is_taken_is_refused(ring: KeyRing, path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(ServerError, match=r"keys has a key of alice already; choose another name, or remove that"):
        add_key(path, "alice")
    assert path.read_bytes() == before


def test_a_name_that_is_not_there_cannot_be_removed(ring: KeyRing, path: Path) -> None:
    with pytest.raises(ServerError, match=r"keys has no key of 'carol'; it has alice, bob\.2\."):
        remove_key(path, "carol")


def test_a_file_with_a_plain_key_is_not_changed(path: Path) -> None:
    path.write_text(KEY)
    for change in (add_key, remove_key):
        with pytest.raises(ServerError, match=r"keys holds one plain key, without a name; give another file, and"):
            change(path, "default")
    assert path.read_text() == KEY
    assert key_names(path) == ["default"]


def test_keys_that_are_added_at_once_are_all_kept(path: Path) -> None:
    wanted = [f"caller{number}" for number in range(20)]
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda name: add_key(path, name), wanted))
    ring = KeyRing.from_file(path)
    assert [ring.caller(key) for key in keys] == wanted
    assert len(read_keys(path).lines) == 21


def test_a_key_of_the_operators_does_not_become_one_of_callers_by_a_reload(tmp_path: Path) -> None:
    """Refused at the start as well; each file alone is right."""
    callers, admin = tmp_path / "callers", tmp_path / "admin"
    key, admin_key = add_key(callers, "alice"), add_key(admin, "root")
    ring, operators = KeyRing.from_file(callers), KeyRing.from_file(admin)
    assert ring.shared_key(operators) is None
    before = admin.read_text()
    with callers.open("a") as file:
        file.write(line("mallory", admin_key))
    fault = ring.reload_if_changed(operators)
    assert fault == (
        f"{callers} and {admin} hold the same key, so that a caller would be an operator; put another key into one of "
        "them."
    )
    assert ring.reload_if_changed(operators) is None, "told once"
    assert (ring.caller(admin_key), ring.caller(key)) == (None, "alice")
    admin.write_text(before.replace("root", "other") + line("new", "k" * 40))
    remove_key(admin, "other")
    assert operators.reload_if_changed(ring) is None
    assert ring.reload_if_changed(operators) is None
    assert ring.caller(admin_key) == "mallory", "the operators have given it up"
