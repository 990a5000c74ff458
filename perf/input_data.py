"""Real speech and a real picture as perf_analyzer's input data: one stream of blocks, the first with the picture.

`python -m perf.input_data out/input.json` writes the demo's speech and portrait, cut as the client library cuts them.
perf_analyzer sends each step of a stream as one request of a sequence: START with the first, END with the last.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import click
import numpy as np

from live_avatar.arrays import Array
from live_avatar.assets import DEMO_PROMPT, PORTRAIT, SPEECH
from live_avatar.errors import InputError, LiveAvatarError
from live_avatar_client.errors import AvatarError
from live_avatar_client.image import read_image_bytes
from live_avatar_client.media import read_speech
from live_avatar_client.protocol import AUDIO, BLOCK_SAMPLES, PROMPT, REFERENCE_IMAGE


def blocks_of(speech: Array, blocks: int | None = None) -> Array:
    """int16 [S] -> [blocks, BLOCK_SAMPLES]: the repeated speech, or the speech once with its last block padded."""
    if not speech.size:
        raise InputError("the speech has 0 samples; give one that says something.")
    wanted = -(-speech.size // BLOCK_SAMPLES) if blocks is None else blocks
    if blocks is None:
        return np.pad(speech, (0, wanted * BLOCK_SAMPLES - speech.size)).reshape(wanted, BLOCK_SAMPLES)
    return np.resize(speech, (wanted, BLOCK_SAMPLES))


def input_data(image: bytes, prompt: str, blocks: Array) -> dict[str, Any]:
    """perf_analyzer's document for one sequence of int16 [blocks, BLOCK_SAMPLES]."""
    steps: list[dict[str, Any]] = [{AUDIO.name: _tensor(block.astype("<i2").tobytes(), block.size)} for block in blocks]
    steps[0][REFERENCE_IMAGE.name] = _tensor(image, len(image))
    steps[0][PROMPT.name] = {"content": [prompt], "shape": [1]}
    return {"data": [steps]}


def write_input_data(path: Path, image: bytes, prompt: str, blocks: Array) -> Path:
    """Raises `InputError` if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(input_data(image, prompt, blocks)))
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); choose another place.") from error
    return path


def _tensor(content: bytes, elements: int) -> dict[str, Any]:
    return {"content": {"b64": base64.b64encode(content).decode()}, "shape": [elements]}


@click.command()
@click.argument("output", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--audio", type=click.Path(path_type=Path), default=SPEECH, help="Speech file; the demo's by default.")
@click.option("--image", type=click.Path(path_type=Path), default=PORTRAIT, help="Picture file; the demo's by default.")
@click.option("--prompt", default=DEMO_PROMPT, show_default=True)
@click.option(
    "--blocks", type=click.IntRange(min=1), help="Number of blocks; the speech repeats. By default the speech once."
)
def main(output: Path, audio: Path, image: Path, prompt: str, blocks: int | None) -> None:
    """Write perf_analyzer's input data for the live_avatar ensemble to OUTPUT."""
    try:
        cut = blocks_of(read_speech(audio), blocks)
        write_input_data(output, read_image_bytes(image), prompt, cut)
    except (LiveAvatarError, AvatarError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"Wrote {output}: one sequence of {len(cut)} blocks.")


if __name__ == "__main__":
    main()
