"""The error of the velocity in FP8 against float32: `python -m perf.fp8_error`.

One stream is run in float32. Each variant then gets the same latents and audio tokens, block by block, and keeps its
own caches, sink and text keys and values. So a block's error is that of the networks and of the variant's caches, and
not of latents that have drifted apart. The sink stays that of the picture. From block 4 on the ring is full. FP8 is
calibrated on a stream of another seed.

`tiny` has the weights of the package. Those of a cut are random, and random weights have no outliers: its figures show
the error of the arithmetic, and not the quality of pictures with trained weights.
"""

from __future__ import annotations

import json
import resource
import shlex
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click
import numpy as np
from torch import Tensor, nn

from export.calibrate import calibrate
from live_avatar.arrays import Array, Arrays
from live_avatar.assets import DEMO_PROMPT, PORTRAIT, SPEECH
from live_avatar.config import S2V_14B, TINY, Preset
from live_avatar.environment import environment
from live_avatar.errors import LiveAvatarError
from live_avatar.exporter.build import export_artifacts
from live_avatar.exporter.quantization import DynamicScaling
from live_avatar.graphs.contract import DIT
from live_avatar.model.linears import is_fp8_in_release
from live_avatar.pipeline.avatar import AvatarEncoder
from live_avatar.pipeline.conditioning import Conditioner
from live_avatar.pipeline.denoiser import Denoiser, all_steps, one_step
from live_avatar.pipeline.generator import cut_blocks
from live_avatar.pipeline.sink import SinkSource
from live_avatar.runtime import Graph, Runtime
from live_avatar.runtime.onnx_runtime import OnnxRuntime
from live_avatar.runtime.torch_runtime import TorchRuntime
from live_avatar.weights import fp8
from live_avatar.weights.checkpoint import open_checkpoint
from live_avatar.weights.tensors import Checkpoint
from live_avatar_client.media import read_speech

SEED, CALIBRATION_SEED = 0, 1


@dataclass(frozen=True)
class Stream:
    """Inputs and results of the float32 networks: audio tokens by block, the rest by step and block."""

    source: SinkSource
    audio: Sequence[dict[str, Array]]
    latents: Mapping[int, Sequence[Array]]
    velocities: Mapping[int, Sequence[Array]]


@dataclass(frozen=True)
class Error:
    """Of one block's velocity [1, 16, F, h, w], counted from 1, at one step."""

    variant: str
    step: int
    block: int
    relative_rms: float
    cosine: float


class _Heard:
    """A runtime that records the patches that its transformer predicts for blocks."""

    def __init__(self, runtime: Runtime) -> None:
        self.preset, self.tokenizer, self.zeros = runtime.preset, runtime.tokenizer, runtime.zeros
        self.free_bytes = runtime.free_bytes
        self.modulation = runtime.modulation
        self.velocities: list[Array] = []
        self._runtime = runtime

    def graph(self, component: str) -> Graph:
        graph = self._runtime.graph(component)
        return _HeardGraph(graph, self.velocities) if component == DIT else graph


class _HeardGraph:
    def __init__(self, graph: Graph, velocities: list[Array]) -> None:
        self._graph, self._velocities = graph, velocities

    def run(self, inputs: Arrays) -> dict[str, Array]:
        outputs = self._graph.run(inputs)
        if inputs["sink_k.0"].shape[2]:  # not a sink itself
            self._velocities.append(outputs["patches"])
        return outputs


class ReleasedFP8(TorchRuntime):
    """The released code's FP8 linears (spec section 15) in float32, with no other rounding."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        for name, module in self._networks.dit.named_modules():
            if isinstance(module, nn.Linear) and is_fp8_in_release(name):
                module.weight.data = fp8.fake_quantize(module.weight.data)
                module.register_forward_pre_hook(_round_input)


def _round_input(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(fp8.fake_quantize(x) for x in args)


def record(runtime: Runtime, speech: Array, blocks: int) -> Stream:
    """The first blocks of a stream, all steps."""
    heard, preset = _Heard(runtime), runtime.preset
    conditioner = Conditioner(heard)
    source = AvatarEncoder(heard).encode_image(PORTRAIT.read_bytes(), DEMO_PROMPT)
    conditioning = conditioner.open(SEED)
    steps = {step: Denoiser(heard, one_step(step)) for step in all_steps(preset.stream.steps)}
    states = {step: stage.open(stage.prefill(source)) for step, stage in steps.items()}
    audio, latents = [], defaultdict(list)
    for samples in [*cut_blocks(speech, preset.stream)][:blocks]:
        given = conditioner.block(conditioning, samples)
        audio.append(given.audio)
        latent = given.noise
        for step, stage in steps.items():
            latents[step].append(latent)
            latent = stage.run(states[step], latent, given.audio)
    count = len(steps)
    return Stream(source, audio, latents, {step: heard.velocities[step - 1 :: count] for step in steps})


def replay(runtime: Runtime, stream: Stream) -> Iterator[tuple[int, list[Array]]]:
    """Velocities of every block at every step, for the latents of `stream`."""
    for step, latents in stream.latents.items():
        heard = _Heard(runtime)
        stage = Denoiser(heard, one_step(step))
        state = stage.open(stage.prefill(stream.source))
        for latent, audio in zip(latents, stream.audio, strict=True):
            stage.run(state, latent, audio)
        yield step, heard.velocities


def errors(variant: str, runtime: Runtime, stream: Stream) -> Iterator[Error]:
    for step, velocities in replay(runtime, stream):
        for block, (got, expected) in enumerate(zip(velocities, stream.velocities[step], strict=True), start=1):
            ours, theirs = got.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
            size = np.linalg.norm(theirs)
            yield Error(
                variant,
                step,
                block,
                relative_rms=float(np.linalg.norm(ours - theirs) / size),
                cosine=float(ours @ theirs / (np.linalg.norm(ours) * size)),
            )


def measure(preset: Preset, blocks: int) -> list[Error]:
    """Every variant against float32, one after the other, so that only one has its weights in memory."""
    checkpoint, speech = open_checkpoint(preset), read_speech(SPEECH)
    narrow = replace(checkpoint, preset=preset.with_precision("bfloat16"))
    fp8_cache = replace(checkpoint, preset=preset.with_kv_cache_dtype("fp8"))
    stream = record(TorchRuntime(checkpoint), speech, blocks)
    found = [*errors("bfloat16", TorchRuntime(narrow), stream)]
    found += errors("past keys and values in FP8", TorchRuntime(fp8_cache), stream)
    found += errors("FP8 as released", ReleasedFP8(checkpoint), stream)
    seen = max(blocks, preset.stream.sink_update_block or 1)
    calibration = calibrate(checkpoint, PORTRAIT.read_bytes(), DEMO_PROMPT, speech, seen, CALIBRATION_SEED)
    for variant, scaling in (("FP8 in ONNX", calibration), ("FP8 in ONNX, dynamic", DynamicScaling())):
        with tempfile.TemporaryDirectory() as folder:
            artifacts = export_artifacts(checkpoint, Path(folder) / "artifacts", lambda component: None, scaling)
            found += errors(variant, OnnxRuntime(artifacts), stream)
    return found


def cut(dim: int, layers: int, side: int) -> Preset:
    """The 14B transformer cut in depth (and width), one step, a square picture; all other networks are small."""
    heads, ffn_dim = dim // S2V_14B.dit.head_dim, S2V_14B.dit.ffn_dim * dim // S2V_14B.dit.dim
    dit = replace(S2V_14B.dit, dim=dim, num_heads=heads, num_layers=layers, ffn_dim=ffn_dim, audio_inject_layers=(0,))
    speech = replace(
        TINY.speech, hidden_size=dit.audio_dim, num_hidden_layers=dit.audio_states - 1, num_attention_heads=16
    )
    stream = replace(TINY.stream, height=side, width=side, steps=1, sink_update_block=2)
    text = replace(TINY.text, d_model=dit.text_dim)
    return Preset(f"s2v-14b cut to {dim} x {layers}", dit, TINY.vae, speech, text, stream)


def table(found: Sequence[Error]) -> str:
    """Markdown: a row for each step and block; relative RMS error and cosine of each variant."""
    variants = list(dict.fromkeys(error.variant for error in found))
    by_place = {(error.variant, error.step, error.block): error for error in found}
    rows = [["step", "block", *variants], ["---"] * (2 + len(variants))]
    for step, block in dict.fromkeys((error.step, error.block) for error in found):
        cells = [by_place[variant, step, block] for variant in variants]
        rows.append([str(step), str(block), *(f"{cell.relative_rms:.4f} / {cell.cosine:.5f}" for cell in cells)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


@click.command()
@click.option("--dim", type=click.IntRange(min=128), help="Width of a cut of the 14B transformer, a multiple of 128.")
@click.option("--layers", type=click.IntRange(min=1), default=1, show_default=True, help="Layers of the cut.")
@click.option("--side", type=click.IntRange(min=64), default=256, show_default=True, help="Picture of the cut, pixels.")
@click.option("--blocks", type=click.IntRange(min=1), default=6, show_default=True, help="Blocks of the stream.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the figures to this file.")
def main(dim: int | None, layers: int, side: int, blocks: int, json_path: Path | None) -> None:
    """Compare velocities of bfloat16 and FP8 with float32, on the tiny preset or on a cut of the 14B one."""
    try:
        preset = TINY if dim is None else cut(dim, layers, side)
        found = measure(preset, blocks)
    except LiveAvatarError as error:
        raise click.ClickException(str(error)) from error
    click.echo(table(found))
    weights = "of the package, trained" if dim is None else f"random, seed {preset.weight_seed}"
    click.echo(f"Relative RMS error / cosine of the velocity, against float32; weights: {weights}.")
    report = {
        "command": shlex.join(["python", "-m", "perf.fp8_error", *sys.argv[1:]]),
        "preset": preset.name,
        "dit": asdict(preset.dit),
        "picture": f"{preset.stream.width}x{preset.stream.height}",
        "weights": weights,
        "environment": environment("torch", "onnxruntime"),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1),
        "results": [asdict(error) for error in found],
    }
    if json_path:
        json_path.write_text(json.dumps(report, indent=1) + "\n")
    click.echo(json.dumps(report))


if __name__ == "__main__":
    main()
