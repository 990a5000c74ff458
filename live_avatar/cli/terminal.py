"""Writes to the terminal: text of any origin without its control characters, and the client's warnings."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import click

from live_avatar_client.errors import AvatarWarning
from live_avatar_client.text import printable

MAX_LINE_CHARS = 20_000


def shown(text: str) -> str:
    """The lines of a text, with a backslash escape for each character that a terminal would obey."""
    return "\n".join(printable(line, MAX_LINE_CHARS) for line in text.split("\n"))


def say(text: str, err: bool = False) -> None:
    """Prints lines as `shown`, with a backslash escape for each character that the terminal's encoding lacks too."""
    encoding = (sys.stderr if err else sys.stdout).encoding
    click.echo(shown(text).encode(encoding, "backslashreplace").decode(encoding), err=err)


@contextmanager
def warnings_said() -> Iterator[None]:
    """Inside, each warning of the client is one sentence on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", AvatarWarning)
        show = warnings.showwarning

        def show_sentence(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, AvatarWarning):
                say(f"Warning: {message}.", err=True)
            else:
                show(message, category, filename, lineno, file, line)

        warnings.showwarning = show_sentence
        yield
