"""What holds the repository together: who imports whom, what is packaged, what is collected."""

import ast
import fnmatch
import importlib
import re
import tomllib
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from live_avatar import assets
from tests.support.repository import ROOT, tracked_files

CORE = ROOT / "live_avatar"
CLIENT = ROOT / "client" / "live_avatar_client"

# The packages of live_avatar in order: each may import those before it and itself, lazy imports included.
PACKAGE_ORDER = (
    "",
    "assets",
    "model",
    "inputs",
    "weights",
    "graphs",
    "runtime",
    "watermark",
    "pipeline",
    "exporter",
    "serving",
    "gateway",
    "cli",
)
"""The first one, without a name, is the shared vocabulary: the modules of `live_avatar` itself."""
CORE_PACKAGES = PACKAGE_ORDER[: PACKAGE_ORDER.index("serving")]
FORBIDDEN_IN_THE_CORE = {"click", "grpc", "live_avatar_client", "triton_python_backend_utils", "tritonclient"}
FORBIDDEN_IN_THE_PACKAGE = {"export", "perf", "tests", "training"}
# A folder of one machine, at the start of a path; spelled so that this file does not find itself.
MACHINE_PATH = re.compile(rb"(?<![\w.-])/(?:" + b"|".join([b"work/", b"tmp/bash_jobs"]) + rb")")
BLOCK_SAMPLES = 7_680


def python_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def imports(path: Path, root: Path) -> Iterator[str]:
    """The full names of the modules that a file imports, relative imports resolved against `root`."""
    package = path.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def offences(files: list[Path], root: Path, forbidden: set[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imports(path, root)
        if name.split(".")[0] in forbidden
    ]


def package_of(path: Path) -> str:
    """The package of a file of live_avatar: the name of its folder, "" for the modules of `live_avatar` itself."""
    return path.relative_to(CORE).parts[0] if len(path.relative_to(CORE).parts) > 1 else ""


def imported_package(name: str) -> str:
    """The package that an imported name `live_avatar.x.y` belongs to."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and (CORE / parts[1]).is_dir() else ""


def test_every_package_has_its_place_in_the_order():
    assert {package_of(path) for path in python_files(CORE)} == set(PACKAGE_ORDER)


def module_names(package: str) -> set[str]:
    """The modules of a package of live_avatar, without `__init__` and `__main__`."""
    return {path.stem for path in (CORE / package).glob("*.py") if not path.stem.startswith("__")}


def test_the_table_of_packages_lists_every_module():
    """In docs/layout.md; the modules of `serving` are listed in docs/architecture.md."""
    layout = (ROOT / "docs" / "layout.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*?) ?\|", layout, re.MULTILINE)
    assert [name for name, _ in rows] == ["live_avatar", *PACKAGE_ORDER[1:]]
    listed = {name: set(modules.split(", ")) - {""} for name, modules in rows if name != "serving"}
    assert listed == {name: module_names("" if name == "live_avatar" else name) for name in listed}


@pytest.mark.parametrize("package", ["serving", "gateway"])
def test_the_packages_own_table_lists_every_module_once(package: str):
    architecture = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = architecture.partition(f"| module of `live_avatar/{package}` |")[2].partition("\n\n")[0]
    cells = [row.split("|")[1] for row in table.splitlines()[2:]]
    listed = [name for cell in cells for name in re.findall(r"`(\w+)\.py`", cell)]
    assert sorted(listed) == sorted(module_names(package))


def test_no_import_runs_upward():
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in python_files(CORE)
        for name in imports(path, ROOT)
        if name.split(".")[0] == "live_avatar"
        and PACKAGE_ORDER.index(imported_package(name)) > PACKAGE_ORDER.index(package_of(path))
    ]
    assert found == []


def test_the_package_imports_nothing_that_is_not_installed_with_it():
    assert offences(python_files(CORE), ROOT, FORBIDDEN_IN_THE_PACKAGE) == []


def test_the_core_imports_no_server_no_client_and_no_command_line():
    files = [path for path in python_files(CORE) if package_of(path) in CORE_PACKAGES]
    assert offences(files, ROOT, FORBIDDEN_IN_THE_CORE) == []


def test_serving_knows_the_core_and_the_clients_protocol_only():
    names = {name for path in python_files(CORE / "serving") for name in imports(path, ROOT) if "client" in name}
    # Of Triton's configuration files, and of the calls with which the supervisor loads models.
    modules = ("model_config_pb2", "service_pb2", "service_pb2_grpc")
    schema = {"tritonclient.grpc", *(f"tritonclient.grpc.{module}" for module in modules)}
    beyond = {
        name
        for name in names - schema
        if name.split(".")[0] == "tritonclient"
        or (
            name.split(".")[0] == "live_avatar_client"
            and name != "live_avatar_client"
            and not name.startswith("live_avatar_client.protocol")
        )
    }
    assert beyond == set()


def test_the_client_knows_nobody():
    files = python_files(CLIENT)
    assert files, f"no Python file under {CLIENT}"
    forbidden = {"export", "live_avatar", "perf", "tests", "torch", "training", "triton_python_backend_utils"}
    assert offences(files, ROOT / "client", forbidden) == []


def test_no_test_imports_another_test():
    found = [
        f"{path.relative_to(ROOT)} imports {name}: move what they share to tests/support"
        for path in python_files(ROOT / "tests")
        for name in imports(path, ROOT)
        if name.startswith("tests.") and any(part.startswith("test_") for part in name.split(".")[:-1])
    ]
    assert found == []


def test_at_most_one_module_touches_the_triton_backend():
    searched = [
        path
        for folder in ("live_avatar", "model_repository", "client", "export", "perf", "training")
        for path in python_files(ROOT / folder)
    ]
    importers = {
        str(path.relative_to(ROOT)) for path in searched if "triton_python_backend_utils" in imports(path, path.parent)
    }
    assert len(importers) <= 1, f"expected one module, got {sorted(importers)}: import it through that one"


def test_the_console_scripts_resolve():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(project["scripts"]) == {"live-avatar"}
    for target in project["scripts"].values():
        module, _, attribute = target.partition(":")
        assert callable(getattr(importlib.import_module(module), attribute)), target


def test_no_tracked_file_names_a_path_of_one_machine():
    found = [
        f"{path.relative_to(ROOT)}: {match.group().decode()}"
        for path in tracked_files()
        if (match := MACHINE_PATH.search(path.read_bytes()))
    ]
    assert found == []


def defines_tests(path: Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return any(isinstance(node, functions) and node.name.startswith("test_") for node in ast.walk(tree))


def test_every_test_is_collected(pytestconfig: pytest.Config):
    """Its file lies under testpaths, has a name that pytest takes, and no folder on the way is skipped."""
    folders = [ROOT / name for name in pytestconfig.getini("testpaths")]
    names: list[str] = pytestconfig.getini("python_files")
    skipped: list[str] = pytestconfig.getini("norecursedirs")
    lost = []
    for path in tracked_files():
        if path.suffix != ".py" or not defines_tests(path):
            continue
        folder = next((folder for folder in folders if folder in path.parents), None)
        if folder is None:
            lost.append(f"{path.relative_to(ROOT)}: outside testpaths")
        elif not any(fnmatch.fnmatch(path.name, pattern) for pattern in names):
            lost.append(f"{path.relative_to(ROOT)}: its name matches none of {names}")
        else:
            parts = path.relative_to(folder).parts[:-1]
            lost += [
                f"{path.relative_to(ROOT)}: pytest skips folders like {pattern}"
                for part in parts
                for pattern in skipped
                if fnmatch.fnmatch(part, pattern)
            ]
    assert lost == []


def test_the_speech_is_what_the_demo_promises():
    with wave.open(str(assets.SPEECH)) as reader:
        format_ = (reader.getframerate(), reader.getnchannels(), reader.getsampwidth())
        samples = np.frombuffer(reader.readframes(reader.getnframes()), dtype="<i2")
    assert format_ == (16_000, 1, 2)
    assert 5.5 <= len(samples) / 16_000 <= 6.5
    assert len(samples) % BLOCK_SAMPLES != 0, "the demo's last block should need padding"
    peak_dbfs = 20 * np.log10(np.abs(samples.astype(np.float64)).max() / 32_767)
    assert peak_dbfs == pytest.approx(-3.0, abs=0.1)
    assert assets.SPEECH.stat().st_size < 250_000


def test_the_portrait_is_what_the_demo_promises():
    with Image.open(assets.PORTRAIT) as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (512, 512))
    assert assets.PORTRAIT.stat().st_size < 150_000


def test_the_assets_are_packaged():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packaged = project["tool"]["setuptools"]["package-data"]["live_avatar.assets"]
    assert {assets.SPEECH.name, assets.PORTRAIT.name} <= set(packaged)
