"""What an import loads: the client stays light, and the protocol lighter."""

import subprocess
import sys

import pytest

import live_avatar_client

_SHOW = "import sys; import {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"


def loaded_by(module: str) -> set[str]:
    command = [sys.executable, "-c", _SHOW.format(module=module)]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


def test_the_protocol_loads_the_standard_library_alone() -> None:
    assert loaded_by("live_avatar_client.protocol").isdisjoint({"numpy", "grpc", "tritonclient", "google"})


def test_the_sessions_load_neither_media_nor_torch() -> None:
    loaded = loaded_by("live_avatar_client.sync, live_avatar_client.aio, live_avatar_client.testing")
    assert loaded.isdisjoint({"av", "PIL", "torch"})
    assert "grpc" in loaded


@pytest.mark.parametrize("name", live_avatar_client.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert getattr(live_avatar_client, name).__name__ == name
    assert name in dir(live_avatar_client)


def test_other_names_do_not() -> None:
    with pytest.raises(AttributeError, match="'live_avatar_client' has no attribute 'Avatar'"):
        _ = live_avatar_client.Avatar
