"""Builds the TensorRT engines of an artifacts folder: `python -m export.engines --artifacts artifacts/s2v-14b`.

An init container calls it: it prints a line per engine, keeps engines that are up to date, waits while another process
builds, and ends when every engine is there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from live_avatar.errors import LiveAvatarError
from live_avatar.exporter.engines import EngineOptions, build_engines


@click.command()
@click.option(
    "--artifacts", type=click.Path(path_type=Path), required=True, help="Artifacts folder to build engines for."
)
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
def main(artifacts: Path, **options: Any) -> None:
    """Build the TensorRT engines of an artifacts folder on this machine."""
    try:
        build_engines(artifacts, EngineOptions(**options), click.echo)
    except LiveAvatarError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
