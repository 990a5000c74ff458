"""The gateway's settings from the server's options."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from live_avatar.gateway.keys import KeyRing, add_key
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.serving.access import Access
from live_avatar.serving.checks import gateway_settings, served_profile
from live_avatar.serving.server_options import ServerOptions, free_ports


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of keys in a mounted Secret of Kubernetes: a link to a file in the folder that the link `..data` names."""
    mount = tmp_path / "keys"
    write_secret(mount, "alice")
    (mount / "api-keys").symlink_to("..data/api-keys")
    return mount / "api-keys"


def write_secret(mount: Path, *names: str) -> None:
    """As the kubelet does it: a new folder, the link moved to it, and the old folder removed."""
    folder, link = mount / f"..{'_'.join(names)}", mount / "..data"
    folder.mkdir(parents=True)
    for name in names:
        add_key(folder / "api-keys", name)
    old = link.readlink() if link.is_symlink() else None
    (mount / "..data_tmp").symlink_to(folder.name)
    os.replace(mount / "..data_tmp", link)
    if old is not None:
        (mount / old / "api-keys").unlink()
        (mount / old).rmdir()


def test_the_keys_of_a_mounted_secret_are_read_again_when_it_changes(
    artifacts: Artifacts, secret: Path, tmp_path: Path
) -> None:
    options = ServerOptions(artifacts.folder, access=Access(api_key_file=secret))
    path = gateway_settings(options, served_profile(options), tmp_path).api_key_file
    assert path is not None
    ring = KeyRing.from_file(path)
    write_secret(secret.parent, "alice", "bob")
    assert ring.reload_if_changed() is None
    assert ring.names == {"alice", "bob"}


def test_files_stay_where_they_are_for_a_gateway_in_another_folder(
    artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ServerOptions(artifacts.folder, access=Access(api_key_file=Path("api-keys")))
    assert gateway_settings(options, served_profile(options), tmp_path).api_key_file == tmp_path / "api-keys"


def test_ports_that_are_found_together_are_different() -> None:
    """The kernel gives a port again as soon as it is free, at random: 20,000 draws would show it."""
    for _ in range(5_000):
        assert len(set(free_ports(4))) == 4
