"""Exit codes of the commands of `training`: 2 and one sentence after a user's mistake, 130 after Ctrl-C."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from live_avatar import interrupts
from live_avatar.errors import LiveAvatarError

INTERRUPTED = 130
FILE = click.Path(path_type=Path)


class UserError(click.ClickException):
    """The sentence of an error for the user."""

    exit_code = 2


@contextmanager
def reported(interrupted: str = "Interrupted.") -> Iterator[None]:
    """Ends the command with its exit code after an error of the project or the file system, or Ctrl-C."""
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


class Number(click.FloatRange):
    """A finite number of a range; click's own type takes NaN for one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is no finite number; give one.", param, ctx)
        return number
