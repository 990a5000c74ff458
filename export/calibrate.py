"""The largest inputs of the linears that FP8 quantizes, seen on a stream: `python -m export.calibrate`.

Runs the torch networks as `live-avatar generate` does, on speech and a picture that should be like those to be served,
and notes what goes into each linear in each component, at all steps and in the sink. No frame is decoded. A pass of
the transformer takes its input from the passes before it, so passes run one after another, and each reads the weights
anew (`export/streamed.py`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from export.passes import BLOCK, SINK, Passes
from export.streamed import streamed_networks
from live_avatar.arrays import Array, Arrays
from live_avatar.assets import DEMO_PROMPT, PORTRAIT, SPEECH
from live_avatar.cli.checkpoint_options import chosen_checkpoint, model_options, stream_options
from live_avatar.errors import ExportError, LiveAvatarError
from live_avatar.exporter.quantization import PART, QUANTIZED, Calibration
from live_avatar.exporter.weight_file import tensor_bytes
from live_avatar.graphs.contract import DIT, Contract
from live_avatar.model.linears import is_fp8, is_fp8_weight
from live_avatar.pipeline.generator import Generator, cut_blocks
from live_avatar.runtime.torch_runtime import CPU, TorchGraph, TorchRuntime
from live_avatar.version import __version__
from live_avatar.weights.tensors import Checkpoint

FILE = click.Path(path_type=Path)
GIB = 2**30
LAST_OF_LAYER = ".ffn.2"


class ObservedRuntime(TorchRuntime):
    """A torch runtime that notes the largest absolute input of every quantized linear, by component, in `amax`.

    `layer_done` is called for each transformer layer that was run. Passes of the transformer that `passes` has are not
    run again.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device = CPU,
        keep_bytes: int = 0,
        passes: Passes | None = None,
        layer_done: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(checkpoint, streamed_networks(checkpoint, device, keep_bytes), device)
        self.amax: dict[str, dict[str, float]] = {name: {} for name in QUANTIZED}
        self._passes = passes
        self._layer_done = layer_done

    def graph(self, component: str) -> TorchGraph:
        if component not in QUANTIZED:
            return super().graph(component)
        made_of = (self._components[component], self._contracts[component], self._device)
        observer = _Observer(self.amax[component], self._layer_done)
        if component == DIT and self._passes is not None:
            return _RecordedGraph(*made_of, observer, self._passes)
        return _ObservedGraph(*made_of, observer)


@dataclass(frozen=True)
class _Observer:
    amax: dict[str, float]
    layer_done: Callable[[], object]

    def note(self, name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        largest = args[0].abs().max().item()
        if not math.isfinite(largest):
            raise ExportError(
                f"{name} was given an input of {largest}, so there is no range to calibrate; try --precision float32 "
                "or other weights."
            )
        self.amax[name] = max(self.amax.get(name, 0.0), largest)
        if name.endswith(LAST_OF_LAYER):
            self.layer_done()


class _ObservedGraph(TorchGraph):
    """Components share linears, so each listens only while it runs."""

    def __init__(self, module: nn.Module, contract: Contract, device: torch.device, observer: _Observer) -> None:
        super().__init__(module, contract, device)
        self._observer = observer
        self._linears = [
            (name, linear)
            for name, linear in module.named_modules()
            if name.startswith(PART) and is_fp8(name.removeprefix(PART))
        ]

    def run(self, inputs: Arrays) -> dict[str, Array]:
        note = self._observer.note
        hooks = [linear.register_forward_pre_hook(partial(note, name)) for name, linear in self._linears]
        try:
            return super().run(inputs)
        finally:
            for hook in hooks:
                hook.remove()


class _RecordedGraph(_ObservedGraph):
    """The transformer, each of whose passes is recorded, and taken from the record if it is there."""

    def __init__(
        self, module: nn.Module, contract: Contract, device: torch.device, observer: _Observer, passes: Passes
    ) -> None:
        super().__init__(module, contract, device, observer)
        self._passes = passes
        self._numbers = count()

    def run(self, inputs: Arrays) -> dict[str, Array]:
        number = next(self._numbers)
        if number < self._passes.done:
            outputs, amax = self._passes.load(number)
            self._observer.amax.update(amax)
            for name in amax:
                if name.endswith(LAST_OF_LAYER):
                    self._observer.layer_done()
            return outputs
        outputs = super().run(inputs)
        prefill = inputs["sink_k.0"].shape[2] == 0
        self._passes.store(number, outputs, self._observer.amax, SINK if prefill else BLOCK)
        return outputs


def calibrate(
    checkpoint: Checkpoint,
    image: bytes,
    prompt: str,
    speech: Array,
    blocks: int,
    seed: int,
    device: torch.device = CPU,
    keep_bytes: int = 0,
    passes: Passes | None = None,
) -> Calibration:
    """Streams the first `blocks` blocks of a speech, int16 [samples], on `device`.

    Memory of the device holds `keep_bytes` of the linears' weights (`streamed_networks`). What `passes` has is not
    computed again. Raises `ExportError` if the speech is shorter, or ends before the sink is replaced: the prefill
    would be calibrated on the picture alone.
    """
    preset = checkpoint.preset
    stream = preset.stream
    least = stream.sink_update_block or 1
    if blocks < least:
        raise ExportError(f"{blocks} blocks are too few: the sink is replaced at block {least}; calibrate on more.")
    cut = list(islice(cut_blocks(speech, stream), blocks))
    if len(cut) < blocks:
        raise ExportError(
            f"the speech has {len(cut)} blocks, {blocks} were asked for; give a longer one or ask for less."
        )
    prefills = 1 if stream.sink_update_block is None else 2
    layers = (prefills + blocks * stream.steps) * preset.dit.num_layers
    with tqdm(total=layers, desc="calibrate", unit="layer", disable=None) as bar:
        runtime = ObservedRuntime(checkpoint, device, keep_bytes, passes, bar.update)
        for _ in Generator(runtime).latents(image, prompt, seed, iter(cut)):
            pass
    return Calibration(preset.name, blocks, runtime.amax)


def facts(checkpoint: Checkpoint, image: bytes, prompt: str, speech: Array, seed: int) -> dict[str, str]:
    """What a calibration is made from, for `Passes`. Weights are told by their files' names, sizes and times, and by
    one tensor, which tells seeds and adapters apart."""
    dit = checkpoint.parts["dit"]
    files = sorted({file for part in checkpoint.parts.values() for file in part.files})
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    adapted = next(name for name in sorted(dit.shapes()) if is_fp8_weight(name))
    return {
        "version": __version__,
        "preset, size, schedule or precision": _sha256(repr(checkpoint.preset).encode()),
        "checkpoint or adapter": _sha256(repr(stamps).encode(), tensor_bytes(dit.read(adapted))),
        "picture": _sha256(image),
        "prompt": prompt,
        "speech": _sha256(np.ascontiguousarray(speech).data),
        "seed": str(seed),
    }


def _sha256(*parts: bytes | memoryview) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _device(context: click.Context, parameter: click.Parameter, value: str | None) -> torch.device:
    if value is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(value)
    except RuntimeError as error:
        raise click.BadParameter(f"{value!r} is no device; give cpu, cuda or cuda:N") from error
    seen = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type != "cpu" and (device.index or 0) >= seen:
        raise click.BadParameter(
            f"torch {torch.__version__} has no {value!r} here, but {seen} CUDA devices; give another device, or "
            "install a torch with CUDA and the GPU's driver"
        )
    return device


@click.command()
@click.option("--output", type=FILE, required=True, help="JSON file to write, for `live-avatar export --fp8`.")
@model_options
@stream_options
@click.option("--image", type=FILE, default=PORTRAIT, help="Picture of a person; the demo's if none is given.")
@click.option("--audio", type=FILE, default=SPEECH, help="Speech; the demo's if none is given.")
@click.option("--prompt", default=DEMO_PROMPT, help="What the scene and the person are like.")
@click.option("--blocks", type=click.IntRange(min=1), default=8, show_default=True, help="Blocks of 0.48 s to run.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the noise.")
@click.option("--device", callback=_device, help="Where the networks run: cpu, cuda or cuda:N; a GPU if there is one.")
@click.option(
    "--keep-gib",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Weights of linears that stay in the device's memory; the rest is read again for every pass.",
)
def main(
    output: Path,
    image: Path,
    audio: Path,
    prompt: str,
    blocks: int,
    seed: int,
    device: torch.device,
    keep_gib: float,
    **chosen: Any,
) -> None:
    """Find the largest inputs of the linears that an FP8 export quantizes.

    Options of the model and the stream are those of `live-avatar export`: calibrate what will be exported. The passes
    that are complete are kept in OUTPUT.partial until the end, and the same command goes on from there.
    """
    from live_avatar_client.errors import AvatarError
    from live_avatar_client.media import read_image_bytes, read_speech

    partial_folder = output.with_name(f"{output.name}.partial")
    try:
        opened = chosen_checkpoint(**chosen)
        # Speakers share all linears, so one of them is enough.
        checkpoint = dataclasses.replace(opened, preset=opened.preset.with_stream(speakers=1))
        made_from = (checkpoint, read_image_bytes(image), prompt, read_speech(audio))
        passes = Passes(partial_folder, facts(*made_from, seed), checkpoint.preset.stream)
        result = calibrate(*made_from, blocks, seed, device, int(keep_gib * GIB), passes)
        result.write(output)
        passes.remove()
    except (LiveAvatarError, AvatarError) as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{output} cannot be written ({error}); give another --output.") from error
    except torch.OutOfMemoryError as error:
        raise click.ClickException(
            f"the memory of {device} is too small ({error}); give a smaller --keep-gib or size, or --device cpu."
        ) from error
    except KeyboardInterrupt:
        click.echo(f"Stopped; the same command goes on from {partial_folder}.", err=True)
        raise
    click.echo(f"Wrote {output} ({sum(map(len, result.amax.values()))} inputs of {len(result.amax)} components).")


if __name__ == "__main__":
    main()
