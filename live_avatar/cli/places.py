"""Refuses folders that Triton's stages cannot work in."""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path

import live_avatar
from live_avatar.errors import ServerError


def require_places(**paths: Path | None) -> None:
    """Raises `ServerError` unless the stages can use the folder for temporary files and the `paths` of these options.

    Triton starts each stage with a shell command that does not quote that folder. The Python inside a stage reads
    paths as ASCII, whatever the locale.
    """
    temporary = tempfile.gettempdir()
    if shlex.quote(temporary) != temporary:
        raise ServerError(
            f"the folder for temporary files is {temporary!r}, where Triton cannot start its stages; set TMPDIR to a "
            "path of ASCII letters, digits, '/', '.', '_' and '-', such as /tmp."
        )
    places = {f"--{name.replace('_', '-')}": path for name, path in paths.items() if path is not None}
    places |= {"the package": Path(live_avatar.__file__).parent, "Python": Path(sys.prefix)}
    for name, path in places.items():
        place = str(path.resolve())
        if not place.isascii():
            raise ServerError(
                f"{name} is at {place!r}, which the stages cannot read; move it to a path of ASCII letters."
            )
