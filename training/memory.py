"""Peak memory of a generator's update against the number of blocks: the plain loop and block-wise accumulation.

`python -m training.memory --blocks 1 --blocks 2` prints a Markdown table and, as the last line, the report as JSON;
--report also writes it.

An update is a window's rollout and the backward pass of a given gradient through it, without the scores, which keep no
graph. The networks have the preset's sizes and random weights. Every figure is measured in a separate process.
`live` is the peak of bytes of live tensors, without those before the update (weights and conditions); it counts every
storage of torch once and is exact, except for temporary memory inside kernels. `resident` is the growth of the
process's resident memory in the same update, with the allocator's overhead.
"""

from __future__ import annotations

import json
import multiprocessing
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from live_avatar.config import MOTION_LATENTS, TINY, Preset
from live_avatar.config import preset as preset_of
from live_avatar.environment import environment
from training.accumulation import backward_by_blocks
from training.checkpoints import write_json
from training.command import FILE, reported
from training.encoded import EncodedClip
from training.init import fresh
from training.roles import whole
from training.rollout import Roller, RolloutInput
from training.window import Place, Window

MIB = 2**20
COUNTS = (1, 2, 4, 8, 16)
EXIT_STEP = 1  # exit step of the rollout; it changes the time, not the memory
SEED = 0


class LiveBytes(TorchDispatchMode):
    """Tracks every new tensor while it is open; `peak` is the largest number of live bytes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: set[int] = set()
        self._bytes = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._see(tensor)
        return result

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Does not count these, which an operation may return as views."""
        self._alive.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def restart(self) -> None:
        """Forgets the peak; what is alive still counts."""
        self.peak = self._bytes

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage._cdata, storage.nbytes()
        if place not in self._alive:
            self._alive.add(place)
            self._bytes += size
            self.peak = max(self.peak, self._bytes)
            weakref.finalize(storage, self._forget, place, size)

    def _forget(self, place: int, size: int) -> None:
        self._alive.discard(place)
        self._bytes -= size


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple | list):
        for one in result:
            yield from _tensors(one)


@dataclass(frozen=True)
class PeakBytes:
    """Memory of one update in bytes."""

    blocks: int
    accumulate: bool
    live_bytes: int
    resident_bytes: int


def measure(preset: Preset, blocks: int, accumulate: bool) -> PeakBytes:
    """Measures an update in this process, first for `resident`, then again for `live`."""
    update = _update(preset, blocks, accumulate)
    resident = _resident_growth(update)
    with LiveBytes() as live:
        update()
    return PeakBytes(blocks, accumulate, live.peak, resident)


def _update(preset: Preset, blocks: int, accumulate: bool) -> Callable[[], None]:
    draw = torch.Generator().manual_seed(SEED)
    dit, roller = whole(fresh(preset.dit, draw)), Roller(Window(preset, blocks))
    noise = roller.window.noise(draw)
    given = RolloutInput(_drawn_clip(preset, blocks, draw), Place(0, 30), noise, EXIT_STEP, replaces=True)
    slope = torch.ones_like(noise)

    def update() -> None:
        made = dit(lambda network: roller.roll_out(network, given, draw, gradient=not accumulate))
        if accumulate:
            backward_by_blocks(roller, dit, given, made, slope)
        else:
            made.latents.backward(slope)
        dit.module.zero_grad()

    return update


def _drawn_clip(preset: Preset, blocks: int, draw: torch.Generator) -> EncodedClip:
    stream, config = preset.stream, preset.dit
    motion = torch.randn(1, 16, MOTION_LATENTS, stream.latent_height, stream.latent_width, generator=draw)
    states = torch.randn(blocks, config.audio_states, config.audio_dim, stream.block_frames, generator=draw)
    text = torch.randn(config.text_len, config.text_dim, generator=draw)
    return EncodedClip(motion[:, :, :1], motion, text, states, states, motion)


def _resident_growth(update: Callable[[], None]) -> int:
    """Measures the rise of the resident memory above its present value. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status_bytes("VmHWM")
    update()
    return status_bytes("VmHWM") - before


def status_bytes(name: str) -> int:
    """A figure of this process in /proc/self/status. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measure_all(preset: Preset, blocks: tuple[int, ...]) -> Iterator[PeakBytes]:
    """Both ways for every number of blocks, each in a new process, one after another."""
    spawn = multiprocessing.get_context("spawn")
    for count in blocks:
        for accumulate in (False, True):
            with ProcessPoolExecutor(1, mp_context=spawn) as process:
                yield process.submit(measure, preset, count, accumulate).result()


def table(peaks: list[PeakBytes]) -> str:
    """Markdown: a row for every number of blocks."""
    found = {(peak.blocks, peak.accumulate): peak for peak in peaks}
    lines = [
        "| blocks | live MiB, plain | live MiB, block by block | resident MiB, plain | resident MiB, block by block |",
        "|---|---|---|---|---|",
    ]
    for count in sorted({peak.blocks for peak in peaks}):
        ways = (found[count, False], found[count, True])
        figures = [*(way.live_bytes for way in ways), *(way.resident_bytes for way in ways)]
        lines.append(f"| {count} | " + " | ".join(f"{figure / MIB:.0f}" for figure in figures) + " |")
    return "\n".join(lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--preset", "name", default=TINY.name, show_default=True, help="Preset of the networks.")
@click.option(
    "--blocks",
    type=click.IntRange(1),
    multiple=True,
    default=COUNTS,
    show_default=True,
    help="Number of blocks; can be repeated.",
)
@click.option("--report", type=FILE, help="Also write the report to this JSON file.")
def main(name: str, blocks: tuple[int, ...], report: Path | None) -> None:
    """Measure the memory that block-wise gradient accumulation saves."""
    with reported():
        peaks = list(measure_all(preset_of(name), blocks))
        made = {
            "command": f"python -m training.memory --preset {name}" + "".join(f" --blocks {count}" for count in blocks),
            "environment": environment("torch"),
            "peaks": [asdict(peak) for peak in peaks],
        }
        if report is not None:
            write_json(report, made)
        click.echo(table(peaks))
        click.echo(json.dumps(made))


if __name__ == "__main__":
    main()
