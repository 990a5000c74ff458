"""The difference between streamed and whole-file speech features, by window and look-ahead.

`python -m perf.speech_window` prints a Markdown table; --json also writes it as JSON.

The speech encoder was trained on whole files. In the stream it gets a rolling window, normalised by the speech so far.
For each length of the window, in blocks, and each look-ahead, the features of all video frames are compared with those
of the whole file, normalised as a whole: the relative RMS difference, and the mean cosine similarity of a frame's
feature vectors, over all states of the encoder.

The tiny preset's weights are random. So its figures describe the locality of the architecture (convolutions and
attention), and not how much context a trained encoder uses.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from live_avatar.arrays import Array
from live_avatar.assets import SPEECH
from live_avatar.config import FPS, SAMPLE_RATE_HZ, SAMPLES_PER_FRAME, TINY, StreamConfig
from live_avatar.errors import ConfigError, InputError, LiveAvatarError
from live_avatar.graphs.artifacts import load_artifacts
from live_avatar.inputs.speech import (
    FEATURE_RATE_HZ,
    NORMALISATION_EPS,
    PCM_SCALE,
    TRAINED_RATE_HZ,
    SpeechWindow,
    interpolate,
    trained_columns,
)
from live_avatar.pipeline.generator import cut_blocks
from live_avatar.runtime import Graph, Runtime
from live_avatar.runtime.onnx_runtime import OnnxRuntime
from live_avatar.runtime.torch_runtime import TorchRuntime
from live_avatar.weights.checkpoint import open_checkpoint
from live_avatar_client.errors import AvatarError
from live_avatar_client.media import read_speech


@dataclass(frozen=True)
class Distance:
    """Difference of streamed features from whole-file features."""

    window_blocks: int
    window_s: float
    lookahead_ms: int
    relative_rms: float
    cosine: float


def whole_features(encoder: Graph, speech: Array) -> Array:
    """Features [K, frames, A] of a speech, int16 [samples], encoded and normalised at once."""
    wide = speech.astype(np.float64) / PCM_SCALE
    samples = (wide - wide.mean()) / np.sqrt(wide.var() + NORMALISATION_EPS)
    hidden = encoder.run({"samples": samples.astype(np.float32)[None]})["hidden"]
    positions = trained_columns(np.arange(speech.size // SAMPLES_PER_FRAME)) * (FEATURE_RATE_HZ / TRAINED_RATE_HZ)
    return interpolate(hidden, np.minimum(positions, hidden.shape[1] - 1))


def streamed_features(encoder: Graph, stream: StreamConfig, speech: Array) -> Array:
    """The same, block by block as in a session."""
    window, made = SpeechWindow(stream), []
    for block in cut_blocks(speech, stream):
        hidden = encoder.run({"samples": window.push(block)})["hidden"]
        made.append(interpolate(hidden, window.positions(hidden.shape[1])))
    first = stream.lookahead_frames  # frames before the speech begins
    return np.concatenate(made, axis=1)[:, first : first + speech.size // SAMPLES_PER_FRAME]


def distance(streamed: Array, whole: Array, stream: StreamConfig) -> Distance:
    ours, expected = streamed.astype(np.float64), whole.astype(np.float64)
    lengths = np.linalg.norm(ours, axis=-1) * np.linalg.norm(expected, axis=-1)
    return Distance(
        stream.speech_window_blocks,
        stream.speech_window_blocks * stream.block_samples / SAMPLE_RATE_HZ,
        stream.lookahead_ms,
        relative_rms=float(np.sqrt(((ours - expected) ** 2).sum() / (expected**2).sum())),
        cosine=float(((ours * expected).sum(-1) / np.maximum(lengths, 1e-12)).mean()),
    )


def measure(
    runtime: Runtime, speech: Array, windows_blocks: Sequence[int], lookaheads_ms: Sequence[int]
) -> list[Distance]:
    """Every window with every look-ahead that fits."""
    if speech.size < SAMPLES_PER_FRAME:
        raise InputError(f"the speech has {speech.size} samples; at least one frame, {SAMPLES_PER_FRAME}, is needed.")
    encoder = runtime.graph("speech_encoder")
    whole, found = whole_features(encoder, speech), []
    for window_blocks in windows_blocks:
        for lookahead_ms in lookaheads_ms:
            if lookahead_ms and lookahead_ms * FPS > 1000 * (window_blocks - 1) * runtime.preset.stream.block_frames:
                continue
            stream = runtime.preset.with_stream(speech_window_blocks=window_blocks, lookahead_ms=lookahead_ms).stream
            found.append(distance(streamed_features(encoder, stream, speech), whole, stream))
    if not found:
        raise ConfigError("no look-ahead fits into a window; give a longer window or a shorter look-ahead.")
    return found


def table(found: Sequence[Distance]) -> str:
    """Markdown: a row for each window; relative RMS difference and cosine similarity for each look-ahead."""
    lookaheads = list(dict.fromkeys(entry.lookahead_ms for entry in found))
    by_place = {(entry.window_blocks, entry.lookahead_ms): entry for entry in found}
    head = ["window", *(f"look-ahead {ms} ms" for ms in lookaheads)]
    rows = [head, ["---"] * len(head)]
    for blocks in dict.fromkeys(entry.window_blocks for entry in found):
        cells = [by_place.get((blocks, ms)) for ms in lookaheads]
        window_s = next(cell.window_s for cell in cells if cell)
        shown = [f"{cell.relative_rms:.3f} / {cell.cosine:.4f}" if cell else "–" for cell in cells]
        rows.append([f"{blocks} ({window_s:.2f} s)", *shown])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _numbers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(word) for word in value.split(",")))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers, such as {parameter.default}.") from error


@click.command()
@click.option("--audio", type=click.Path(path_type=Path), default=SPEECH, help="Speech file; the demo's by default.")
@click.option(
    "--artifacts",
    type=click.Path(path_type=Path),
    help="Artifacts to run on ONNX Runtime; by default the tiny preset in torch.",
)
@click.option("--windows-blocks", callback=_numbers, default="1,2,4,8,16", show_default=True, help="Windows to try.")
@click.option("--lookahead-ms", callback=_numbers, default="0,120,240", show_default=True, help="Look-aheads to try.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the figures to this file.")
def main(
    audio: Path,
    artifacts: Path | None,
    windows_blocks: tuple[int, ...],
    lookahead_ms: tuple[int, ...],
    json_path: Path | None,
) -> None:
    """Compare streamed speech features with whole-file ones."""
    try:
        speech = read_speech(audio)
        runtime: Runtime = OnnxRuntime(load_artifacts(artifacts)) if artifacts else TorchRuntime(open_checkpoint(TINY))
        found = measure(runtime, speech, windows_blocks, lookahead_ms)
    except (LiveAvatarError, AvatarError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(table(found))
    click.echo("Relative RMS difference / mean cosine similarity, of streamed from whole-file features.")
    if json_path:
        report: dict[str, Any] = {
            "command": "python -m perf.speech_window",
            "preset": runtime.preset.name,
            "runtime": "onnxruntime" if artifacts else "torch",
            "audio": audio.name,
            "audio_s": speech.size / SAMPLE_RATE_HZ,
            "results": [asdict(entry) for entry in found],
        }
        json_path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
