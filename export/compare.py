"""Every graph of an artifacts folder on ONNX Runtime against the torch component, on fresh random inputs.

`python -m export.compare --artifacts artifacts/tiny`; prints a table and fails if a graph is further from
torch than its tolerance. Symbolic dimensions are tried at their least, usual and greatest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from export.graphs import random_inputs
from live_avatar.artifacts import load_artifacts
from live_avatar.checkpoint import open_checkpoint
from live_avatar.errors import LiveAvatarError
from live_avatar.lora import LoRA
from live_avatar.runtime.onnx_runtime import OnnxRuntime
from live_avatar.runtime.torch_runtime import TorchRuntime

RELATIVE_TOLERANCE = 1e-4  # float32, of the largest value of an output
PIXEL_TOLERANCE = 1.0  # a value on the edge of two pixel levels may fall to either side


@dataclass(frozen=True)
class Difference:
    """Largest difference over one graph's outputs: relative for floats, in levels for pixels."""

    component: str
    relative: float
    pixels: float

    @property
    def within(self) -> bool:
        return self.relative <= RELATIVE_TOLERANCE and self.pixels <= PIXEL_TOLERANCE


def compare(
    artifacts: Path,
    checkpoint: Path | None,
    seed: int,
    components: Sequence[str] = (),
    lora: LoRA | None = None,
) -> Iterator[Difference]:
    """Yields the widest difference of each component (all, if none is named) over its symbolic dimensions' extents."""
    loaded = load_artifacts(artifacts)
    exported, oracle = OnnxRuntime(loaded), TorchRuntime(open_checkpoint(loaded.preset, checkpoint, lora))
    for name in components or loaded.contracts:
        contract = loaded.contracts[name]
        ours, theirs = exported.graph(name), oracle.graph(name)
        relative = pixels = 0.0
        for extent in range(3 if contract.ranges else 1):
            inputs = random_inputs(contract, seed + extent, extent)
            expected = theirs.run(inputs)
            for output, got in ours.run(inputs).items():
                error = np.abs(got.astype(np.float64) - expected[output].astype(np.float64)).max(initial=0.0)
                if got.dtype == np.uint8:
                    pixels = max(pixels, float(error))
                else:
                    relative = max(relative, float(error / max(np.abs(expected[output]).max(initial=0.0), 1e-6)))
        yield Difference(name, relative, pixels)


@click.command()
@click.option("--artifacts", type=click.Path(path_type=Path), required=True, help="Artifacts folder to check.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Weights it was exported from, if not the random ones.",
)
@click.option("--seed", default=1, show_default=True, help="Seed of the random inputs.")
def main(artifacts: Path, checkpoint: Path | None, seed: int) -> None:
    """Compare every exported graph with torch."""
    try:
        failed = []
        click.echo(f"{'component':20} {'relative error':>15} {'pixel levels':>13}")
        for difference in compare(artifacts, checkpoint, seed):
            mark = "" if difference.within else "  TOO LARGE"
            click.echo(f"{difference.component:20} {difference.relative:15.1e} {difference.pixels:13.0f}{mark}")
            failed += [] if difference.within else [difference.component]
    except LiveAvatarError as error:
        raise click.ClickException(str(error)) from error
    if failed:
        raise click.ClickException(
            f"{', '.join(failed)} differ from torch by more than {RELATIVE_TOLERANCE:.0e}; export again."
        )


if __name__ == "__main__":
    main()
