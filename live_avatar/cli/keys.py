"""`live-avatar keys add | remove | list`: the file of API keys."""

from __future__ import annotations

from pathlib import Path

import click

from live_avatar.cli.options import FILE


@click.group()
def keys() -> None:
    """Change the file of API keys that `serve` takes as --api-key-file. A running server reads it again."""


@keys.command()
@click.argument("file", type=FILE)
@click.argument("name")
def add(file: Path, name: str) -> None:
    """Make a key for the caller NAME and print it. FILE keeps its hash only, so the key cannot be shown again."""
    from live_avatar.gateway.keys import add_key

    click.echo(add_key(file, name))


@keys.command()
@click.argument("file", type=FILE)
@click.argument("name")
def remove(file: Path, name: str) -> None:
    """Take the key of the caller NAME out of FILE."""
    from live_avatar.gateway.keys import remove_key

    remove_key(file, name)


@keys.command("list")
@click.argument("file", type=FILE)
def names(file: Path) -> None:
    """Print the names of the callers in FILE."""
    from live_avatar.gateway.keys import key_names

    for name in key_names(file):
        click.echo(name)
