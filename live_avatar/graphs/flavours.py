"""The two compilers of engines, TensorRT and TensorRT-RTX: everything in which they differ for this project.

The builder (`live_avatar.exporter.engines`) and the runtime (`live_avatar.runtime.tensorrt_runtime`) are one program
for both, and read here what to do differently. An artifacts folder has engines of one flavour.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from live_avatar.errors import ConfigError


@dataclass(frozen=True)
class Flavour:
    """One compiler with its runtime library.

    name: the word of `--target`; module: the Python module; least_version: the first that reads every operator of
    opset 23 that the graphs use; package: what pip installs.

    ahead_of_time: it compiles for compute capabilities that are named, without a GPU; such an engine runs on every GPU
    of these capabilities. Otherwise it times its kernels on the GPU that will run them, and keeps a timing cache.

    jit: kernels are finished when an engine is loaded and when a shape is new, and are kept in a runtime cache. Both
    flavours are captured into CUDA graphs by our runtime, so the library's own capture stays off; and what is captured
    must not be a kernel that is replaced later, so shapes are specialised at once and not in the background.
    """

    name: str
    title: str
    module: str
    least_version: tuple[int, int]
    package: str
    ahead_of_time: bool
    jit: bool

    @property
    def least(self) -> str:
        return ".".join(map(str, self.least_version))

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f"`pip install '{self.package}>={self.least}'`"


TENSORRT = Flavour(
    name="tensorrt",
    title="TensorRT",
    module="tensorrt",
    least_version=(10, 15),
    package="tensorrt-cu13",
    ahead_of_time=False,
    jit=False,
)
TENSORRT_RTX = Flavour(
    name="tensorrt-rtx",
    title="TensorRT-RTX",
    module="tensorrt_rtx",
    least_version=(1, 7),
    package="tensorrt-rtx-cu12",
    ahead_of_time=True,
    jit=True,
)
FLAVOURS: Mapping[str, Flavour] = {flavour.name: flavour for flavour in (TENSORRT, TENSORRT_RTX)}


def find_flavour(name: str) -> Flavour:
    """Raises `ConfigError` for a name that is not a flavour's."""
    if name not in FLAVOURS:
        raise ConfigError(f"there is no compiler {name!r}; choose {' or '.join(FLAVOURS)}.")
    return FLAVOURS[name]
