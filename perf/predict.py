"""Predicts a profile's speed from stage times: `python -m perf.predict --profile gpux5 --step-ms 120 --decoder-ms 60`.

It is the command line of the model in `perf.schedule`.
"""

from __future__ import annotations

import click

from live_avatar.errors import ConfigError
from perf.figures import rounded
from perf.report import table
from perf.scenarios.schedule import StageDurations, asked

MILLISECONDS = click.FloatRange(min=0)


@click.command()
@click.option("--profile", default="gpux5", show_default=True, help="Hardware profile: a name, or a file (NAME.toml).")
@click.option("--step-ms", type=MILLISECONDS, required=True, help="Time of one denoising step.")
@click.option("--decoder-ms", type=MILLISECONDS, required=True, help="Time to decode a block.")
@click.option("--conditioning-ms", type=MILLISECONDS, default=0.0, help="Time to condition a block.")
@click.option("--prefill-ms", type=MILLISECONDS, default=0.0, help="Time to prefill the new sink, once in a session.")
def main(profile: str, step_ms: float, decoder_ms: float, conditioning_ms: float, prefill_ms: float) -> None:
    """Predict FPS, TTFF and real-time sessions of one node, for a known avatar."""
    times = (one / 1e3 for one in (conditioning_ms, step_ms, prefill_ms, decoder_ms))
    try:
        click.echo(table(rounded(asked(StageDurations("given", "the command line", *times), profile))))
    except ConfigError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
