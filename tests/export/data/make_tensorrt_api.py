"""Writes `tensorrt_api.json`: what TensorRT's own Python bindings offer, by version, class, member and argument.

`python -m tests.export.data.make_tensorrt_api 10.15.1.29 11.0.0.114 11.4.0.106` downloads the wheels
`tensorrt-cu13-bindings`, about 1.2 MB each, and imports each in a process of its own, with empty libraries in the place
of TensorRT's (no wheel has those; they are needed for calling, not for looking). Needs pip and a C compiler, which is
why the result is kept here and the wheels are no dependency of the tests: two versions cannot be installed at once.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PACKAGE = "tensorrt-cu13-bindings"
TARGET = Path(__file__).with_name("tensorrt_api.json")
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
# pybind11 begins a docstring with the signature, or lists one for every overload.
LOOK = r"""
import importlib, json, re, sys
module = importlib.import_module(sys.argv[1])

def arguments(function, name):
    signatures = re.findall(rf"^(?:\d+\. )?{name}\((.*)\) -> ", function.__doc__ or "", re.MULTILINE)
    return [re.findall(r"(?:^|, )(\w+):", inside) for inside in signatures]

def look(cls):
    seen = {}
    for name in dir(cls):
        member = getattr(cls, name)
        if name == "__init__" or not name.startswith("_"):
            is_class = isinstance(member, type)
            seen[name] = look(member) if is_class else arguments(member, name) if callable(member) else None
    return seen

print(json.dumps({name: look(getattr(module, name)) for name in json.loads(sys.argv[2])}))
"""
CLASSES = (
    "Builder",
    "BuilderFlag",
    "DataType",
    "ExecutionContextAllocationStrategy",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IProgressMonitor",
    "IStreamWriter",
    "ProfilingVerbosity",
    "ITimingCache",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "ParserError",
    "Runtime",
)


def look(module: str, classes: Iterable[str], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Classes of a module: for a property or enumerator null, for a method its arguments, by overload."""
    words = [sys.executable, "-c", LOOK, module, json.dumps(list(classes))]
    seen = subprocess.run(words, env=environment, check=True, capture_output=True, text=True)
    return json.loads(seen.stdout)


def look_at_version(version: str, folder: Path) -> dict[str, Any]:
    """What one version has, from its wheel."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*pip, f"{PACKAGE}=={version}"], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    source = folder / "empty.c"
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in FUNCTIONS))
    for library in LIBRARIES:
        name = f"lib{library}.so.{version.split('.')[0]}"
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), str(source)]
        subprocess.run(command, check=True)
    return look("tensorrt_bindings", CLASSES, {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(folder)})


def main(versions: list[str]) -> None:
    api = {}
    for version in versions:
        with tempfile.TemporaryDirectory() as folder:
            api[version] = look_at_version(version, Path(folder))
    source = f"{PACKAGE} on PyPI; made by python -m tests.export.data.make_tensorrt_api {' '.join(versions)}"
    lines = [f'"source": {json.dumps(source)}']
    for version, classes in api.items():
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(members)}" for name, members in classes.items())
        lines.append(f'"{version}": {{\n{rows}\n }}')
    TARGET.write_text("{\n " + ",\n ".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
