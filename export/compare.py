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

from live_avatar.arrays import Array
from live_avatar.errors import ArtifactError, LiveAvatarError
from live_avatar.exporter.tracing import random_inputs
from live_avatar.graphs.artifacts import Artifacts, load_artifacts
from live_avatar.graphs.contract import Contract, Extent
from live_avatar.runtime.onnx_runtime import OnnxRuntime
from live_avatar.runtime.torch_runtime import TorchRuntime
from live_avatar.weights.checkpoint import open_checkpoint
from live_avatar.weights.lora import LoRA
from live_avatar.weights.tensors import Checkpoint

# Root mean squares: the VAE's norms divide by the length of vectors, and one pixel whose vector is almost zero would
# decide about a largest difference.
RELATIVE_TOLERANCE = 1e-4  # float32; 4e-6 was measured
FLOAT16_TOLERANCE = 1e-2
# Of the speech encoder the attention alone is in float16, in every export in 16 bits; 1.4e-4 was measured.
SPEECH_TOLERANCE = 2e-3
# FP8: what quantizing costs, and no error of the export (`python -m perf.fp8_error` measures it). The VAE in float16:
# 0.011 was measured with small random networks.
COARSE_TOLERANCE = 0.1
PIXEL_TOLERANCE = 0.1  # a value on the edge of two pixel levels may fall to either side
COARSE_PIXEL_TOLERANCE = 2.0


@dataclass(frozen=True)
class Difference:
    """Of the output that is furthest from torch's: root mean square of the difference, relative to that of torch's
    output, or in levels for pixels."""

    component: str
    relative: float
    pixels: float
    tolerance: float = RELATIVE_TOLERANCE

    @property
    def within(self) -> bool:
        levels = COARSE_PIXEL_TOLERANCE if self.tolerance == COARSE_TOLERANCE else PIXEL_TOLERANCE
        return self.relative <= self.tolerance and self.pixels <= levels


def tolerance(artifacts: Artifacts, component: str) -> float:
    """Of the relative difference, by what the export did to the component's numbers."""
    network, precision = component.split("_")[0], artifacts.preset.precision
    if (network == "dit" and artifacts.manifest["fp8"] is not None) or (network == "vae" and precision == "float16"):
        return COARSE_TOLERANCE
    if network == "speech" and precision != "float32":
        return SPEECH_TOLERANCE
    return FLOAT16_TOLERANCE if network == "dit" and precision == "float16" else RELATIVE_TOLERANCE


def compare(
    artifacts: Artifacts, checkpoint: Checkpoint, seed: int, components: Sequence[str] = ()
) -> Iterator[Difference]:
    """Yields the widest difference of each component (all, if none is named) over its symbolic dimensions' extents.

    Torch runs first and is gone before ONNX Runtime loads a graph, so that large models need room for one of them.
    """
    chosen = [artifacts.contracts[name] for name in components or artifacts.contracts]
    inputs = {contract.name: _inputs(contract, seed) for contract in chosen}
    oracle = TorchRuntime(checkpoint)
    expected = {name: [oracle.graph(name).run(given) for given in several] for name, several in inputs.items()}
    del oracle
    exported = OnnxRuntime(artifacts)
    for name, several in inputs.items():
        graph = exported.graph(name)
        relative, pixels = _difference([graph.run(given) for given in several], expected[name])
        yield Difference(name, relative, pixels, tolerance(artifacts, name))


def _inputs(contract: Contract, seed: int) -> list[dict[str, Array]]:
    """Inputs at every extent of every profile: least, usual, greatest, less those that are equal."""
    extents = {
        tuple(sizes[extent] for sizes in ranges.values()): (profile, extent)
        for profile, ranges in contract.profiles.items()
        for extent in Extent
    }
    chosen: list[tuple[str | None, Extent]] = [*extents.values()] or [(None, Extent.OPT)]
    return [random_inputs(contract, seed + extent, extent, profile) for profile, extent in chosen]


def _difference(ours: list[dict[str, Array]], theirs: list[dict[str, Array]]) -> tuple[float, float]:
    """Of the furthest output: relative for numbers, in levels for pixels."""
    relative = pixels = 0.0
    for results, expected in zip(ours, theirs, strict=True):
        for output, array in expected.items():
            wide = array.astype(np.float64)
            error = _rms(results[output].astype(np.float64) - wide)
            if array.dtype == np.uint8:
                pixels = max(pixels, error)
            else:
                relative = max(relative, error / max(_rms(wide), 1e-6))
    return relative, pixels


def _rms(values: Array) -> float:
    return float(np.sqrt(np.square(values).mean())) if values.size else 0.0


@click.command()
@click.option("--artifacts", type=click.Path(path_type=Path), required=True, help="Artifacts folder to check.")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Weights it was exported from, if not the package's or random ones.",
)
@click.option("--lora", type=click.Path(path_type=Path), help="Adapter it was exported with.")
@click.option("--lora-alpha", type=float, help="The adapter's alpha, where the file does not say it.")
@click.option("--component", "components", multiple=True, help="Compare this component alone; may be repeated.")
@click.option("--seed", default=1, show_default=True, help="Seed of the random inputs.")
def main(
    artifacts: Path,
    checkpoint: Path | None,
    lora: Path | None,
    lora_alpha: float | None,
    components: tuple[str, ...],
    seed: int,
) -> None:
    """Compare exported graphs with torch."""
    try:
        loaded = load_artifacts(artifacts)
        if unknown := set(components) - loaded.contracts.keys():
            raise ArtifactError(f"{artifacts} has no component {min(unknown)!r}; it has {', '.join(loaded.contracts)}.")
        adapter = LoRA(lora, alpha=lora_alpha) if lora else None
        weights = open_checkpoint(loaded.preset, checkpoint, adapter)
        failed = []
        click.echo(f"{'component':20} {'relative error':>15} {'pixel levels':>13}")
        for difference in compare(loaded, weights, seed, components):
            mark = "" if difference.within else "  TOO LARGE"
            click.echo(f"{difference.component:20} {difference.relative:15.1e} {difference.pixels:13.3f}{mark}")
            failed += [] if difference.within else [difference.component]
    except LiveAvatarError as error:
        raise click.ClickException(str(error)) from error
    if failed:
        raise click.ClickException(
            f"{', '.join(failed)} differ from torch by more than what their precision allows; export again."
        )


if __name__ == "__main__":
    main()
