"""All that the project takes from the modules `tensorrt` and `tensorrt_rtx` is in NVIDIA's own bindings.

Those of TensorRT are 10.15 to 11.4; that of TensorRT-RTX is the one that is installed.

Two steps: every `trt.` name in the code, and every member and argument of the stand-in that the tests run the code
on (`tests/support/fake_tensorrt.py`, `fake_tensorrt_rtx.py`), is looked up in what the bindings offer: of TensorRT in
`data/tensorrt_api.json`, of TensorRT-RTX in the module. What the code calls on an object that it got is thereby
covered: the stand-ins have nothing else.
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from live_avatar.graphs.flavours import TENSORRT
from tests.export.data.make_tensorrt_api import look
from tests.support.fake_tensorrt import tensorrt_module
from tests.support.fake_tensorrt_rtx import tensorrt_rtx_module

ROOT = Path(__file__).parents[2]
API = json.loads((Path(__file__).parent / "data" / "tensorrt_api.json").read_text())
VERSIONS = [name for name in API if name != "source"]
USERS = ("live_avatar/exporter/engines.py", "live_avatar/runtime/tensorrt_runtime.py")
RTX_ONLY = {"ComputeCapability", "CudaGraphStrategy", "DynamicShapesKernelSpecializationStrategy"}
"""Classes that the code takes from TensorRT-RTX alone."""


def dotted(node: ast.expr) -> list[str] | None:
    """`a.b.c` as a list, None for any other expression."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return None if before is None else [*before, node.attr]
    return None


def names_in_code() -> set[tuple[str, ...]]:
    """What stands behind `trt.` (the module by any way it is reached) in the code."""
    found = set()
    for user in USERS:
        for node in ast.walk(ast.parse((ROOT / user).read_text())):
            path = dotted(node) if isinstance(node, ast.Attribute) else None
            if path and "trt" in path[:-1] and "__version__" not in path:
                found.add(tuple(path[path.index("trt") + 1 :]))
    return found


def members_of_stand_in(cls: type) -> Iterator[tuple[str, list[str] | None]]:
    """Name and arguments of every member that is not private; None for what is no method."""
    listed = set(vars(cls))
    if not hasattr(cls, "__members__"):  # what its methods put on `self` is a member, too
        listed |= {
            node.attr
            for node in ast.walk(ast.parse(inspect.getsource(cls)))
            if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        }
    for name in sorted(listed):
        member = vars(cls).get(name)
        if not name.startswith("_") and name not in ("version", "known") and not isinstance(member, type):
            yield name, list(inspect.signature(member).parameters) if inspect.isfunction(member) else None


def stand_ins() -> dict[str, type]:
    module: Any = tensorrt_module("11.4.0.106")
    return {name: base(value) for name, value in vars(module).items() if isinstance(value, type)}


def base(cls: type) -> type:
    """The class as it is written: the module gives some of them a version."""
    written = cls.__mro__[1]
    return written if written.__name__ == cls.__name__ else cls


@pytest.mark.parametrize("version", VERSIONS)
def test_every_name_in_the_code_is_in_the_bindings(version: str) -> None:
    names = names_in_code()
    assert ("MemoryPoolType", "WORKSPACE") in names
    assert ("ILogger", "Severity", "ERROR") in names
    for path in names:
        if path[0] in RTX_ONLY:
            continue
        found: Any = API[version]
        for part in path:
            assert part in found, f"tensorrt.{'.'.join(path)} is not in TensorRT {version}"
            found = found[part]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_stand_in_has_nothing_that_the_bindings_lack(version: str) -> None:
    checked = 0
    for name, cls in stand_ins().items():
        offered = API[version][name]
        for member, arguments in members_of_stand_in(cls):
            assert member in offered, f"{name}.{member} is not in TensorRT {version}"
            if arguments is not None:
                assert arguments in offered[member], f"{name}.{member}{arguments}: {version} has {offered[member]}"
            checked += 1
    assert checked >= 40


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_made_by_its_class_takes_the_arguments_that_the_code_gives(version: str) -> None:
    for name in ("Builder", "Runtime", "OnnxParser", "ILogger"):
        arguments = list(inspect.signature(stand_ins()[name].__init__).parameters)
        assert arguments in API[version][name]["__init__"]


def test_the_bindings_looked_at_begin_with_the_least_version() -> None:
    assert VERSIONS[0].startswith("{}.{}.".format(*TENSORRT.least_version))
    assert {version.split(".")[0] for version in VERSIONS} == {"10", "11"}


@pytest.fixture(scope="module")
def rtx_stand_ins() -> dict[str, type]:
    return {name: value for name, value in vars(tensorrt_rtx_module()).items() if isinstance(value, type)}


@pytest.fixture(scope="module")
def rtx_api(rtx_stand_ins: dict[str, type]) -> dict[str, Any]:
    """What the installed TensorRT-RTX offers."""
    return look("tensorrt_rtx", {*rtx_stand_ins, *(path[0] for path in names_in_code())})


def test_every_name_in_the_code_is_in_tensorrt_rtx(rtx_api: dict[str, Any]) -> None:
    names = names_in_code()
    assert {path[0] for path in names} > RTX_ONLY
    for path in names:
        found: Any = rtx_api
        for part in path:
            assert part == "__members__" or part in found, f"{'.'.join(path)} is not in the installed TensorRT-RTX"
            found = found.get(part)


def test_the_stand_in_has_nothing_that_tensorrt_rtx_lacks(
    rtx_stand_ins: dict[str, type], rtx_api: dict[str, Any]
) -> None:
    checked = 0
    for name, value in rtx_stand_ins.items():
        written = [cls for cls in value.__mro__ if cls.__module__.startswith("tests.") and "version" not in vars(cls)]
        for cls in written:
            for member, arguments in members_of_stand_in(cls):
                if (name, member) == ("IExecutionContext", "finished"):
                    continue
                assert member in rtx_api[name], f"{name}.{member} is not in the installed TensorRT-RTX"
                if arguments is not None:
                    offered = rtx_api[name][member]
                    assert arguments in offered, f"{name}.{member}{arguments}: TensorRT-RTX has {offered}"
                checked += 1
    assert checked >= 50
