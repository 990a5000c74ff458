"""Options that several commands share, and the client's connection arguments that follow from them."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from live_avatar_client.protocol import MAX_SEED

F = TypeVar("F", bound=Callable[..., Any])

FILE = click.Path(path_type=Path)


class Integer(click.IntRange):
    name = "integer"  # otherwise click calls 1.5 "not a valid integer range"


def listening_address(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """Returns the IP address of an option; of a host name the first, IPv4 before IPv6."""
    host = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    try:
        found = socket.getaddrinfo(host or None, None, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:  # ValueError: letters that no name has
        reason = getattr(error, "strerror", None) or error
        raise click.BadParameter(
            f"{value!r} is no address to listen on ({reason}); give one such as 127.0.0.1"
        ) from error
    return min((family != socket.AF_INET, str(place[0])) for family, _, _, _, place in found)[1]


def combined(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Returns one decorator that adds several options; help shows the last one first."""

    def add(command: F) -> F:
        for option in options:
            command = option(command)
        return command

    return add


capability_option = click.option(
    "--compute-capability",
    "capabilities",
    metavar="X.Y",
    multiple=True,
    help="With tensorrt-rtx: GPUs to build for, such as 8.9; may be given several times. Then no GPU is needed. "
    "Default: the GPU of this machine.",
)

# Shared by `generate`, `stream` and `say`.
image_options = combined(
    click.option(
        "--frames-output", type=FILE, help="Also write the raw frames, uint8 [frames, H, W, 3], to this .npy."
    ),
    click.option("--output", type=FILE, required=True, help="MP4 file to write: H.264 video, AAC speech."),
    click.option(
        "--seed",
        type=Integer(0, MAX_SEED),
        default=0,
        show_default=True,
        help="The same seed and inputs give the same frames.",
    ),
    click.option("--prompt", default="", help="Description of the scene and the person."),
    click.option("--image", type=FILE, required=True, help="Picture of the person: PNG, JPEG or WebP."),
)

# Shared by `generate` and `stream`.
speech_options = combined(
    image_options,
    click.option(
        "--mask",
        "masks",
        multiple=True,
        help="Where a speaker is, for each --audio if there are several: a PNG of the picture's size, light at the "
        "speaker, or a box in its pixels, x,y,width,height.",
    ),
    click.option(
        "--audio",
        "--speech",
        "audio",
        type=FILE,
        required=True,
        multiple=True,
        help="Speech: any file that FFmpeg reads, resampled to 16 kHz. Once for each speaker in the picture.",
    ),
)


# Shared by `stream`, `say`, `doctor` and `web`.
connection_options = combined(
    click.option("--tls-key", type=FILE, help="Private key of --tls-certificate (PEM)."),
    click.option("--tls-certificate", type=FILE, help="Certificate of this client (PEM), if the server requires one."),
    click.option(
        "--tls-ca",
        type=FILE,
        help="Certificate authority of the server (PEM); for a public one put grpcs:// in front of the address.",
    ),
    click.option("--api-key-file", type=FILE, help="File with the server's API key."),
)


def connection_arguments(
    api_key_file: Path | None, tls_ca: Path | None, tls_certificate: Path | None, tls_key: Path | None
) -> dict[str, Any]:
    """Returns the arguments `api_key` and `tls` of the client."""
    from live_avatar.serving.access import read_key
    from live_avatar_client.tls import TLS

    given = any(path is not None for path in (tls_ca, tls_certificate, tls_key))
    return {
        "api_key": None if api_key_file is None else read_key(api_key_file),
        "tls": TLS(tls_ca, tls_certificate, tls_key) if given else None,
    }


def artifacts_option(required: bool) -> Callable[[F], F]:
    return click.option(
        "--artifacts", type=FILE, required=required, help="Folder made by `live-avatar export`, run on ONNX Runtime."
    )
