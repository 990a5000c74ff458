"""`live-avatar verify | watermark-key | signing-key`: whose video it is, and the keys that say so."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from live_avatar.cli.options import FILE, F, Integer, combined
from live_avatar.cli.terminal import say

if TYPE_CHECKING:
    from live_avatar_client.credentials import ContentCredentials

watermark_options = combined(
    click.option("--operator", type=Integer(0, 65535), help="With --watermark: the number of who serves, 0 to 65535."),
    click.option(
        "--watermark",
        type=FILE,
        help="File with the key of an invisible mark that every frame gets. See `watermark-key` and `verify`.",
    ),
)


def signing_options(what: str) -> Callable[[F], F]:
    """The options of a certificate with its key, which sign `what`."""
    return combined(
        click.option("--sign-key", type=FILE, help="Private key of --sign-certificate (PEM, ECDSA on P-256)."),
        click.option("--sign-certificate", type=FILE, help=f"Certificate (PEM) that signs {what}. See `signing-key`."),
    )


def credentials_of(certificate: Path | None, key: Path | None) -> ContentCredentials | None:
    """What signs videos; None without the options. Raises `SigningError` for a pair that could not sign now."""
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise click.UsageError("--sign-certificate and --sign-key go together; give both, or none")
    from live_avatar.signing import read_signer
    from live_avatar_client.credentials import ContentCredentials

    read_signer(certificate, key)  # so that a video is not made first and then cannot be signed
    return ContentCredentials(certificate, key)


@click.command("watermark-key")
@click.argument("file", type=FILE)
def watermark_key(file: Path) -> None:
    """Make the key of an invisible mark and write it to the new FILE. Who has it can find and forge marks."""
    from live_avatar.watermark.key import make_key

    make_key(file)
    say(f"Wrote {file}; keep it: without it no mark can be found.")


@click.command("signing-key")
@click.argument("name")
@click.option("--folder", type=FILE, default=".", show_default=True, help="Where the three files are written.")
def signing_key(name: str, folder: Path) -> None:
    """Make a certificate with its key for a try: NAME.pem and NAME.key sign, NAME-ca.pem is what others --trust.

    Nobody trusts its authority by default. For videos that others shall check, get a certificate from an authority of
    the C2PA trust list.
    """
    from live_avatar.signing import make_pair

    paths = make_pair(name, folder)
    say("Wrote {}, {} and {}.".format(*paths))


@click.command()
@click.argument("file", type=FILE)
@click.option("--watermark", type=FILE, help="File with the key of the invisible mark to look for.")
@click.option("--trust", type=FILE, help="Certificates (PEM) of the authorities whose signers you trust.")
@click.option("--json", "for_scripts", is_flag=True, help="Print JSON.")
def verify(file: Path, watermark: Path | None, trust: Path | None, for_scripts: bool) -> None:
    """Show where a video or picture comes from: what it says, who signed that, and the invisible mark in its pixels.

    Exit code 0: a mark, or a manifest signed by somebody you trust, shows the origin. 1: nothing shows it. 2: the file
    or an option cannot be used. 3: something was altered after it was signed.
    """
    from live_avatar.cli.verify import as_json, as_lines, examine

    report = examine(file, watermark, trust)
    say(as_json(report) if for_scripts else "\n".join(as_lines(report, file)))
    sys.exit(report.exit_code)
