"""Runs scenarios: `python -m perf.run SCENARIO...`, from a checkout. Without a name it lists the scenarios.

It starts the server that a scenario needs, or measures the one at --url, and writes `NAME.json` (command, versions,
machine, commit, figures) and pictures. It prints a table; the last line of stdout is the path of the last JSON file.
Exit code 1: a check has failed.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from live_avatar import interrupts
from live_avatar.environment import environment
from live_avatar.errors import LiveAvatarError
from live_avatar.graphs.artifacts import load_artifacts
from live_avatar_client.errors import AvatarError
from perf.figures import rounded
from perf.report import RESULTS, table
from perf.scenario import Context, Figures, Scenario, broken
from perf.scenarios import (
    ablation,
    arrivals,
    engines,
    kernels,
    long,
    pipeline,
    realtime,
    roofline,
    schedule,
    sessions,
    single,
    start,
    timeline,
    turn,
)

ROOT = Path(__file__).parents[1]
MODULES = (
    single,
    realtime,
    sessions,
    start,
    turn,
    arrivals,
    pipeline,
    long,
    ablation,
    schedule,
    roofline,
    timeline,
    kernels,
    engines,
)
SCENARIOS: dict[str, Scenario] = {module.SCENARIO.name: module.SCENARIO for module in MODULES}


def report(scenario: Scenario, context: Context, figures: Figures, commit: str | None) -> dict[str, Any]:
    """The JSON document of one run of the code of `commit`."""
    artifacts = load_artifacts(context.artifacts)
    return {
        "scenario": scenario.name,
        "about": scenario.about,
        "command": command(scenario, context),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "environment": environment("nvidia-pytriton", "numpy", *scenario.packages),
        "artifacts": {"preset": artifacts.preset.name, "fingerprint": artifacts.fingerprint},
        "figures": rounded(figures),
    }


def command(scenario: Scenario, context: Context) -> str:
    """The command of the run; the address of a server elsewhere is replaced by HOST:PORT."""
    options = [*(["--quick"] if context.quick else []), *(["--url", "HOST:PORT"] if context.url else [])]
    seed = ["--seed", str(context.seed)] if context.seed else []
    return shlex.join(["python", "-m", "perf.run", scenario.name, *options, *seed])


def commit() -> str | None:
    """The checkout's commit, with `+` if there are changes since; None outside a checkout."""
    described = _git("rev-parse", "--short", "HEAD")
    return None if described is None else described + ("+" if _git("status", "--porcelain", "-uno") else "")


def _git(*words: str) -> str | None:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def write(document: Mapping[str, Any], out: Path) -> Path:
    path = out / f"{document['scenario']}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def run(scenario: Scenario, context: Context) -> tuple[Path, list[str]]:
    """Measures, prints and writes; returns the JSON file, and a sentence for each failed check."""
    click.echo(f"{scenario.name}: {scenario.about}")
    context.out.mkdir(parents=True, exist_ok=True)
    begun_at = commit()
    document = report(scenario, context, scenario.measure(context), begun_at)
    click.echo(table(document["figures"]))
    return write(document, context.out), broken(document["figures"])


def _listed() -> str:
    width = max(map(len, SCENARIOS))
    return "\n".join(f"  {one.name:{width}}  {one.about}" for one in SCENARIOS.values())


@click.command()
@click.argument("names", nargs=-1, metavar="SCENARIO...")
@click.option(
    "--artifacts",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path("artifacts/tiny"),
    show_default=True,
    help="Folder made by `live-avatar export`.",
)
@click.option("--url", help="host:port of a running server's gRPC port; by default a server is started.")
@click.option("--quick", is_flag=True, help="Make the shortest useful run.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=RESULTS,
    help="Folder for JSON and PNG files; perf/results by default.",
)
def main(names: tuple[str, ...], artifacts: Path, url: str | None, quick: bool, seed: int, out: Path) -> None:
    """Run scenarios one after another."""
    if not names:
        click.echo(f"Scenarios:\n{_listed()}")
        return
    if unknown := [name for name in names if name not in SCENARIOS]:
        raise click.UsageError(f"there is no scenario {unknown[0]!r}; there are\n{_listed()}")
    interrupts.install()
    context = Context(artifacts, out, url, quick, seed, log=lambda line: click.echo(line, err=True))
    wrong: list[str] = []
    path = out
    try:
        for name in names:
            path, sentences = run(SCENARIOS[name], context)
            wrong += sentences
    except (LiveAvatarError, AvatarError, OSError) as problem:
        raise click.ClickException(str(problem)) from problem
    for sentence in wrong:
        click.echo(f"DOES NOT HOLD: {sentence}")
    click.echo(str(path))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
