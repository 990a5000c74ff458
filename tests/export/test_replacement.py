"""A folder takes the place of an old one as a whole, and the old one survives every failure."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from live_avatar.errors import ExportError
from live_avatar.exporter.replacement import replacing


class FailedError(Exception):
    """What goes wrong inside."""


def made(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "file").write_text(text)
    return folder


def replace(output: Path, text: str = "new") -> None:
    with replacing(output) as folder:
        (folder / "file").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["artifacts", "a" * 255, "ä" * 127, "a b\\n"])
def test_the_new_folder_stands_alone_in_the_place_of_the_old_one(tmp_path: Path, name: str) -> None:
    output = made(tmp_path / name, "old")
    replace(output)
    assert (output / "file").read_text() == "new"
    assert names(output) == ["file"]
    assert names(tmp_path) == [name]


def test_missing_folders_above_are_made(tmp_path: Path) -> None:
    replace(tmp_path / "a" / "b")
    assert names(tmp_path / "a") == ["b"]


def test_the_old_folder_stands_until_the_new_one_is_complete(tmp_path: Path) -> None:
    output = made(tmp_path / "artifacts", "old")
    with replacing(output) as folder:
        assert names(folder) == []
        assert (output / "file").read_text() == "old"


def test_a_failure_inside_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    output = made(tmp_path / "artifacts", "old")
    with pytest.raises(FailedError), replacing(output):
        raise FailedError
    assert (output / "file").read_text() == "old"
    assert names(tmp_path) == ["artifacts"]


def test_a_move_that_fails_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = made(tmp_path / "artifacts", "old")
    move = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return move(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output error"):
        replace(output)
    assert (output / "file").read_text() == "old"
    assert names(tmp_path) == ["artifacts"]


def test_an_old_folder_that_cannot_be_brought_back_is_kept_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = made(tmp_path / "artifacts", "old")
    move = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if target == output:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return move(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    message = r"artifacts could not be put back \(Input/output error\); it is in (.*/old): move it from there\."
    with pytest.raises(ExportError, match=message):
        replace(output)
    monkeypatch.undo()
    assert [path.read_text() for path in tmp_path.glob(".export-*/old/file")] == ["old"]
    replace(output, "newer")
    assert (output / "file").read_text() == "newer"
    assert names(tmp_path) == ["artifacts"]


KILLED = """
import os, signal, sys
from pathlib import Path
from live_avatar.exporter.replacement import replacing

move = Path.rename

def killed(path, target):
    if path.name == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)
    return move(path, target)

Path.rename = killed
with replacing(Path(sys.argv[1])) as folder:
    (folder / "file").write_text("half")
"""


@pytest.mark.parametrize("before_the_move_of", ["artifacts", "new"])
def test_what_a_killed_export_left_is_put_in_order_by_the_next(tmp_path: Path, before_the_move_of: str) -> None:
    output = made(tmp_path / "artifacts", "old")
    ended = subprocess.run([sys.executable, "-c", KILLED, output, before_the_move_of], check=False)
    assert ended.returncode == -9
    with replacing(output) as folder:
        assert names(folder) == []
        assert (output / "file").read_text() == "old"
    assert names(output) == []
    assert names(tmp_path) == ["artifacts"]


def test_a_second_export_to_the_same_folder_is_refused_at_once(tmp_path: Path) -> None:
    output = made(tmp_path / "artifacts", "old")
    message = r"another export writes to .*artifacts; wait until it has ended, or choose another --output\."
    with replacing(output) as folder:
        (folder / "file").write_text("new")
        with pytest.raises(ExportError, match=message):
            replace(output, "second")
        replace(tmp_path / "other")
    assert (output / "file").read_text() == "new"
    assert names(tmp_path) == ["artifacts", "other"]


@pytest.mark.parametrize("dangling", [False, True])
def test_a_symbolic_link_is_refused_with_where_it_leads(tmp_path: Path, dangling: bool) -> None:
    target = tmp_path / "target"
    if not dangling:
        made(target, "old")
    (tmp_path / "link").symlink_to(target)
    before = names(tmp_path)
    message = (
        rf"link is a symbolic link, which new artifacts would replace; give the folder that it leads to, "
        rf"--output {target}\."
    )
    with pytest.raises(ExportError, match=message):
        replace(tmp_path / "link")
    assert names(tmp_path) == before


@pytest.mark.parametrize("output", [".", "..", "../work"])
def test_the_working_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(ExportError, match=r" is or contains the working directory, which cannot be replaced; choose"):
        replace(Path(output))
    assert names(tmp_path / "work") == []


MOUNTED = """
import sys
from pathlib import Path
from live_avatar.errors import ExportError
from live_avatar.exporter.replacement import replacing

try:
    with replacing(Path(sys.argv[1])):
        print("the work is done")
except ExportError as error:
    print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")
def test_a_mount_point_is_refused_before_the_work(tmp_path: Path) -> None:
    output, source = made(tmp_path / "artifacts", "old"), made(tmp_path / "source", "mounted")
    script = 'mount --bind "$1" "$2" && exec "$3" -c "$4" "$2"'
    command = ["unshare", "-m", "sh", "-c", script, "sh", source, output, sys.executable, MOUNTED]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    if said.returncode != 0 and "permi" in said.stderr:
        pytest.skip(said.stderr)
    assert said.stderr == ""
    assert said.stdout == (
        f"{output} is a mount point, so that new artifacts cannot take its place; choose another --output, such as "
        f"{output}/artifacts.\n"
    )
    assert names(tmp_path) == ["artifacts", "source"]
    assert (source / "file").read_text() == "mounted"
