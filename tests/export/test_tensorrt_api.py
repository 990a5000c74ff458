"""All that the project takes from the module `tensorrt` is in TensorRT's own bindings, 10.15 to 11.4.

Two steps: every `trt.` name in the code, and every member and argument of the stand-in that the tests run the code
on (`tests/support/fake_tensorrt.py`), is looked up in what the bindings offer (`data/tensorrt_api.json`). What the code
calls on an object that it got is thereby covered: the stand-in has nothing else.
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from live_avatar.runtime.tensorrt_runtime import LEAST_VERSION
from tests.support.fake_tensorrt import tensorrt_module

ROOT = Path(__file__).parents[2]
API = json.loads((Path(__file__).parent / "data" / "tensorrt_api.json").read_text())
VERSIONS = [name for name in API if name != "source"]
USERS = ("live_avatar/exporter/engines.py", "live_avatar/runtime/tensorrt_runtime.py")


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
            if path and "trt" in path and path[-1] not in ("trt", "__version__"):
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
    assert VERSIONS[0].startswith("{}.{}.".format(*LEAST_VERSION))
    assert {version.split(".")[0] for version in VERSIONS} == {"10", "11"}
