"""The largest inputs of the linears that FP8 quantizes, seen on a stream: `python -m export.calibrate`.

Runs the torch networks as `live-avatar generate` does, on speech and a picture that should be like those to be served,
and notes what goes into each linear in each component, at all steps and in the sink.
"""

from __future__ import annotations

import math
from collections import defaultdict
from functools import partial
from itertools import islice
from pathlib import Path

import click
from torch import Tensor, nn

from live_avatar.arrays import Array, Arrays
from live_avatar.assets import DEMO_PROMPT, PORTRAIT, SPEECH
from live_avatar.config import PRECISIONS, PRESETS, preset
from live_avatar.errors import ExportError, LiveAvatarError
from live_avatar.exporter.quantization import PART, QUANTIZED, Calibration
from live_avatar.graphs.contract import Contract
from live_avatar.model.linears import is_fp8
from live_avatar.pipeline.generator import Generator, cut_blocks
from live_avatar.runtime.torch_runtime import TorchGraph, TorchRuntime
from live_avatar.weights.checkpoint import open_checkpoint
from live_avatar.weights.lora import LoRA
from live_avatar.weights.tensors import Checkpoint

FILE = click.Path(path_type=Path)


class ObservedRuntime(TorchRuntime):
    """A torch runtime that notes the largest absolute input of every quantized linear, by component, in `amax`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.amax: defaultdict[str, dict[str, float]] = defaultdict(dict)

    def graph(self, component: str) -> TorchGraph:
        if component not in QUANTIZED:
            return super().graph(component)
        module, contract = self._components[component], self._contracts[component]
        return _ObservedGraph(module, contract, self.amax[component])


class _ObservedGraph(TorchGraph):
    """Components share linears, so each listens only while it runs."""

    def __init__(self, module: nn.Module, contract: Contract, amax: dict[str, float]) -> None:
        super().__init__(module, contract)
        self._amax = amax
        self._linears = [
            (name, linear)
            for name, linear in module.named_modules()
            if name.startswith(PART) and is_fp8(name.removeprefix(PART))
        ]

    def run(self, inputs: Arrays) -> dict[str, Array]:
        hooks = [linear.register_forward_pre_hook(partial(self._note, name)) for name, linear in self._linears]
        try:
            return super().run(inputs)
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        largest = args[0].abs().max().item()
        if not math.isfinite(largest):
            raise ExportError(
                f"{name} was given an input of {largest}, so there is no range to calibrate; try --precision float32 "
                "or other weights."
            )
        self._amax[name] = max(self._amax.get(name, 0.0), largest)


def calibrate(checkpoint: Checkpoint, image: bytes, prompt: str, speech: Array, blocks: int, seed: int) -> Calibration:
    """Streams the first `blocks` blocks of a speech, int16 [samples].

    Raises `ExportError` if the speech is shorter, or ends before the sink is replaced: the prefill would be calibrated
    on the picture alone.
    """
    stream = checkpoint.preset.stream
    least = stream.sink_update_block or 1
    if blocks < least:
        raise ExportError(f"{blocks} blocks are too few: the sink is replaced at block {least}; calibrate on more.")
    runtime = ObservedRuntime(checkpoint)
    made = Generator(runtime).stream(image, prompt, seed, cut_blocks(speech, stream))
    seen = sum(1 for _ in islice(made, blocks))
    if seen < blocks:
        raise ExportError(f"the speech has {seen} blocks, {blocks} were asked for; give a longer one or ask for less.")
    return Calibration(checkpoint.preset.name, blocks, {name: dict(amax) for name, amax in runtime.amax.items()})


@click.command()
@click.option("--output", type=FILE, required=True, help="JSON file to write, for `live-avatar export --fp8`.")
@click.option("--checkpoint", type=FILE, help="Folder with the weights; else the package's own, or random ones.")
@click.option("--lora", type=FILE, help="Adapter, as in `live-avatar export`: calibrate what will be exported.")
@click.option("--lora-alpha", type=float, help="The adapter's alpha, where the file does not say it.")
@click.option("--preset", "preset_name", type=click.Choice(sorted(PRESETS)), help="As in `live-avatar export`.")
@click.option("--precision", type=click.Choice(PRECISIONS), help="Type to run in; bfloat16 takes half the memory.")
@click.option("--image", type=FILE, default=PORTRAIT, help="Picture of a person; the demo's if none is given.")
@click.option("--audio", type=FILE, default=SPEECH, help="Speech; the demo's if none is given.")
@click.option("--prompt", default=DEMO_PROMPT, help="What the scene and the person are like.")
@click.option("--blocks", type=click.IntRange(min=1), default=8, show_default=True, help="Blocks of 0.48 s to run.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the noise.")
def main(
    output: Path,
    checkpoint: Path | None,
    lora: Path | None,
    lora_alpha: float | None,
    preset_name: str | None,
    precision: str | None,
    image: Path,
    audio: Path,
    prompt: str,
    blocks: int,
    seed: int,
) -> None:
    """Find the largest inputs of the linears that an FP8 export quantizes."""
    from live_avatar_client.errors import AvatarError
    from live_avatar_client.media import read_image_bytes, read_speech

    try:
        adapter = LoRA(lora, alpha=lora_alpha) if lora else None
        found = open_checkpoint(None if preset_name is None else preset(preset_name), checkpoint, adapter)
        chosen = found.preset.with_precision(precision or found.preset.precision)
        opened = Checkpoint(chosen, found.parts, found.tokenizer)
        result = calibrate(opened, read_image_bytes(image), prompt, read_speech(audio), blocks, seed)
    except (LiveAvatarError, AvatarError) as error:
        raise click.ClickException(str(error)) from error
    result.write(output)
    click.echo(f"Wrote {output} ({sum(map(len, result.amax.values()))} inputs of {len(result.amax)} components).")


if __name__ == "__main__":
    main()
