"""Builds the engines of an artifacts folder: `python -m export.engines --artifacts artifacts/s2v-14b`.

An init container calls it: it prints a line per engine, keeps engines that are up to date, waits while another process
builds, and ends when every engine is there. With `--target tensorrt-rtx --compute-capability 8.9` it needs no GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from live_avatar import interrupts
from live_avatar.cli.options import capability_option
from live_avatar.errors import LiveAvatarError
from live_avatar.exporter.engines import EngineOptions, build_engines
from live_avatar.graphs.flavours import FLAVOURS, TENSORRT

INTERRUPTED = 130


@click.command()
@click.option(
    "--artifacts", type=click.Path(path_type=Path), required=True, help="Artifacts folder to build engines for."
)
@click.option(
    "--target", type=click.Choice(list(FLAVOURS)), default=TENSORRT.name, show_default=True, help="Compiler to use."
)
@capability_option
@click.option("--components", multiple=True, help="Component to build, may be given several times. Default: all.")
@click.option(
    "--weights-on-host",
    multiple=True,
    help="Component whose weights stay in host memory and are streamed in every run, such as text_encoder.",
)
@click.option("--rebuild", is_flag=True, help="Build engines that are up to date, too.")
@click.option("--gpu-memory-gib", type=float, help="Memory of the GPU: refuse before building what would not fit.")
@click.option("--sessions", type=click.IntRange(1), default=1, show_default=True, help="Sessions at once that fit.")
@click.option("--device", type=click.IntRange(0), default=0, show_default=True, help="Number of the GPU.")
def main(artifacts: Path, target: str, **options: Any) -> None:
    """Build the TensorRT or TensorRT-RTX engines of an artifacts folder on this machine."""
    interrupts.install()
    try:
        build_engines(artifacts, EngineOptions(FLAVOURS[target], **options), click.echo)
    except LiveAvatarError as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
