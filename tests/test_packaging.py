"""Wheels, sdists and images hold every tracked file of the packages, data files included."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath
from shutil import copy2

import pytest

from tests.k8s.dockerfile import context
from tests.support.repository import ROOT, tracked_files

IMAGE_FOLDERS = ("client", "export", "live_avatar", "model_repository")
"""Folders that an image gets whole: `export` and `model_repository` are used from the checkout at /opt/live-avatar."""
BUILD = """
import sys
from setuptools import build_meta
folder = sys.argv[1]  # setuptools changes sys.argv
build_meta.build_wheel(folder)
build_meta.build_sdist(folder)
"""
BUILD_LIMIT_S = 120.0


def tracked_below(folder: str) -> set[str]:
    names = (path.relative_to(ROOT) for path in tracked_files())
    return {name.as_posix() for name in names if folder in map(str, name.parents)}


def build(project: str, folder: Path) -> Path:
    """Builds the wheel and the sdist of a distribution from its tracked files alone; the folder that holds both."""
    source, built = folder / "source", folder / "built"
    names = {"pyproject.toml", "README.md", "LICENSE", *tracked_below("live_avatar"), *tracked_below("client")}
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        copy2(ROOT / name, source / name)
    built.mkdir()
    command = [sys.executable, "-c", BUILD, built]
    result = subprocess.run(command, cwd=source / project, capture_output=True, text=True, timeout=BUILD_LIMIT_S)
    assert result.returncode == 0, result.stdout + result.stderr
    return built


def in_wheel(built: Path) -> set[str]:
    [wheel] = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def in_sdist(built: Path) -> set[str]:
    """Names below the one folder of an sdist."""
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        return {"/".join(PurePosixPath(name).parts[1:]) for name in archive.getnames()}


@pytest.fixture(scope="module")
def server_built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("", tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def client_built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("client", tmp_path_factory.mktemp("client"))


def test_the_servers_wheel_and_sdist_hold_all_files_of_the_package(server_built: Path):
    files = tracked_below("live_avatar")
    assert {"live_avatar/py.typed", "live_avatar/assets/tiny/dit.safetensors"} <= files
    assert files - in_wheel(server_built) == set()
    assert files - in_sdist(server_built) == set()


def test_the_clients_wheel_and_sdist_hold_all_files_of_the_package(client_built: Path):
    files = {name.removeprefix("client/") for name in tracked_below("client/live_avatar_client")}
    assert "live_avatar_client/py.typed" in files
    assert files - in_wheel(client_built) == set()
    assert files - in_sdist(client_built) == set()


def test_a_wheel_installs_one_package(server_built: Path):
    """Folders that are run from a checkout, like `export`, do not land in a user's site-packages."""
    tops = {PurePosixPath(name).parts[0] for name in in_wheel(server_built)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"live_avatar"}


@pytest.mark.parametrize("folder", IMAGE_FOLDERS)
def test_an_image_holds_all_files_of_a_folder(folder: str):
    files = tracked_below(folder)
    assert files
    assert files - {path.as_posix() for path in context(ROOT)} == set()
