"""Host memory of an export: the peak of the whole command against the largest file it writes.

`python -m perf.export_memory [--json FILE] -- EXPORT OPTIONS`, where the options are those of `live-avatar export`.
The command runs in a separate process, and Linux reports its memory while it runs. Anonymous memory is counted apart
from pages of mapped files, which the kernel can take back.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import click

from live_avatar.environment import environment
from live_avatar.graphs.artifacts import load_artifacts

POLL_S = 0.02
GIB = 2**30


def resident_bytes(process: int) -> dict[str, int]:
    """Resident memory of a process by kind: `RssAnon`, `RssFile`, `RssShmem`; empty once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    pairs = (line.split(":") for line in lines if line.startswith("Rss"))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def peak_bytes(command: list[str]) -> tuple[int, dict[str, int]]:
    """Runs a command; returns its exit code and the peak of each kind of memory and of their sum (`total`)."""
    peaks: dict[str, int] = {}
    process = subprocess.Popen(command)
    while process.poll() is None:
        found = resident_bytes(process.pid)
        for name, size in {**found, "total": sum(found.values())}.items():
            peaks[name] = max(size, peaks.get(name, 0))
        time.sleep(POLL_S)
    return process.returncode, peaks


def _output(options: tuple[str, ...]) -> Path:
    """The value of the export's option --output."""
    for position, option in enumerate(options):
        if option.startswith("--output="):
            return Path(option.partition("=")[2])
        if option == "--output" and position + 1 < len(options):
            return Path(options[position + 1])
    raise click.UsageError("the export's options have no --output; give them after `--`")


@click.command()
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the figures to this file.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def main(json_path: Path | None, options: tuple[str, ...]) -> None:
    """Measure the memory of `live-avatar export OPTIONS`."""
    output = _output(options)
    started_s = time.monotonic()
    code, peaks = peak_bytes([sys.executable, "-m", "live_avatar.cli", "export", *options])
    if code:
        raise click.ClickException(f"the export ended with code {code}; what it said stands above.")
    files = {name: facts["bytes"] for name, facts in load_artifacts(output).manifest["files"].items()}
    largest = max(files, key=lambda name: files[name])
    report = {
        "command": "python -m perf.export_memory -- " + " ".join(options),
        "environment": environment("torch", "onnx"),
        "seconds": round(time.monotonic() - started_s, 1),
        "peak_bytes": peaks,
        "written_bytes": sum(files.values()),
        "largest_file": {"name": largest, "bytes": files[largest]},
        "peak_over_largest_file": round(peaks["total"] / files[largest], 3),
    }
    click.echo(
        f"peak {peaks['total'] / GIB:.2f} GiB, of which {peaks['RssAnon'] / GIB:.2f} GiB its own; wrote "
        f"{sum(files.values()) / GIB:.2f} GiB; peak / {largest}: {report['peak_over_largest_file']}"
    )
    if json_path:
        json_path.write_text(json.dumps(report, indent=1) + "\n")
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
