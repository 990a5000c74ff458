"""How the commands of `training` end: a mistake of the user with one sentence and exit code 2, Ctrl-C with 130."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from live_avatar import interrupts
from live_avatar.errors import LiveAvatarError

INTERRUPTED = 130
FILE = click.Path(path_type=Path)


class UserError(click.ClickException):
    """A sentence for the user."""

    exit_code = 2


@contextmanager
def reported(interrupted: str = "Interrupted.") -> Iterator[None]:
    """Inside, an error of the project, of the file system, or Ctrl-C ends the command as the module says."""
    interrupts.install()
    try:
        yield
    except LiveAvatarError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        place = error.filename or "standard output"
        raise UserError(f"{place}: {error.strerror}; use a path that exists and is writable.") from error
    except KeyboardInterrupt:
        click.echo(interrupted, err=True)
        sys.exit(INTERRUPTED)
