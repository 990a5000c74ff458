"""Clips for the transformer: rendered, and encoded once by the frozen VAE and encoders.

A data set is a folder with one safetensors file per clip and a manifest with its identity; an incomplete one is
completed. The stored tensors equal the output of `pipeline.conditioning` for the same picture, prompt and speech;
latents up to the rounding of the VAE's convolutions to bfloat16.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from live_avatar.arrays import Array
from live_avatar.config import MOTION_LATENTS, TEMPORAL_STRIDE, Preset
from live_avatar.errors import CheckpointError
from live_avatar.graphs.components import SpeechEncoder, TextEncoder
from live_avatar.graphs.digests import file_sha256
from live_avatar.inputs.speech import SpeechWindow, interpolate
from live_avatar.inputs.text import make_tokenizer
from live_avatar.json_files import read_json
from live_avatar.model.networks import Networks, meta_networks
from live_avatar.pipeline.lru import LRU
from training.checkpoints import check_identity, load_weights, write_json, write_whole
from training.config import TrainingConfig
from training.data.clips import Split, make_clip
from training.errors import TrainingError

CPU = torch.device("cpu")
FOLDER = "data"
MANIFEST = "manifest.json"
SILENCE = "silence.safetensors"
ENCODERS = {
    "vae": "mouths/vae.safetensors",
    "speech": "encoders/speech.safetensors",
    "text": "encoders/text.safetensors",
}
"""Paths of the frozen networks' weights in a run's folder."""
STORED = ("motion", "text", "states", "latents")
PIECE_FRAMES = 24  # that the VAE encodes at once, a multiple of 4
TEXTS = 16  # prompts whose features are remembered


@dataclass(frozen=True)
class EncodedClip:
    """One clip, all float32.

    reference [1, 16, 1, h, w] and motion [1, 16, 19, h, w]: latents of the still picture; text [text_len, text_dim];
    states [blocks, K, A, 12]: the speech encoder's states at the frames of every block; silence: the same of a stream
    without sound; latents [1, 16, 3 * blocks, h, w]: of the video, after the warm-up on the still picture.
    """

    reference: Tensor
    motion: Tensor
    text: Tensor
    states: Tensor
    silence: Tensor
    latents: Tensor


def pixels(frames: Array) -> Tensor:
    """uint8 [T, H, W, 3] -> float32 [1, 3, T, H, W] in -1..1, as `image.decode_image` has them."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def speech_windows(speech: Array, preset: Preset) -> list[tuple[Array, Array]]:
    """The speech encoder's input in a stream, block by block: samples [1, n], and a matrix from features to frames.

    The matrix, [12, T], maps the window's T features to the block's frames, like `speech.interpolate`.
    """
    window = SpeechWindow(preset.stream)
    seen = []
    for block in speech.reshape(-1, preset.stream.block_samples):
        samples = window.push(block)
        count = preset.speech.feature_count(samples.shape[1])
        columns = np.eye(count, dtype=np.float32)[None]
        seen.append((samples, interpolate(columns, window.positions(count))[0]))
    return seen


class Take(Protocol):
    """A drawn or filmed clip; the fields are those of `training.data.clips.Clip`."""

    @property
    def prompt(self) -> str: ...

    @property
    def picture(self) -> Array: ...

    @property
    def speech(self) -> Array: ...

    @property
    def frames(self) -> Array: ...


class ClipEncoder:
    """The frozen networks of a run, on one device; what they give is on the CPU."""

    def __init__(
        self,
        preset: Preset,
        networks: Networks,
        tokenizer_file: Path | None = None,
        device: torch.device = CPU,
    ) -> None:
        self._preset = preset
        self._device = device
        self._vae = networks.vae.to(device)
        self._speech = SpeechEncoder(networks).to(device)
        self._text = TextEncoder(networks).to(device)
        self._tokenizer = make_tokenizer(preset, tokenizer_file)
        self._texts: LRU[Tensor] = LRU(TEXTS)

    def encode(self, clip: Take, silence: Tensor) -> EncodedClip:
        """A clip -> its stored tensors; `silence` is for its number of blocks."""
        motion, latents = self.video(clip.picture, clip.frames)
        return EncodedClip(motion[:, :, :1], motion, self.text(clip.prompt), self.states(clip.speech), silence, latents)

    def text(self, prompt: str) -> Tensor:
        """Features of a prompt, [text_len, text_dim]; recent ones are remembered."""
        return self._texts.get(prompt.encode(), lambda: self._text_features(prompt))

    @torch.no_grad()
    def _text_features(self, prompt: str) -> Tensor:
        ids, mask = (torch.from_numpy(one).to(self._device) for one in self._tokenizer.encode(prompt))
        features: Tensor = self._text(ids, mask)
        return features.cpu()

    @torch.no_grad()
    def states(self, speech: Array) -> Tensor:
        """int16 [blocks * samples] -> [blocks, K, A, 12]."""
        made = [
            torch.from_numpy(frames) @ self._speech(torch.from_numpy(samples).to(self._device)).cpu()
            for samples, frames in speech_windows(speech, self._preset)
        ]
        return torch.stack(made).transpose(2, 3).contiguous()

    def silence(self, blocks: int) -> Tensor:
        """The states of a stream without sound."""
        return self.states(np.zeros(blocks * self._preset.stream.block_samples, dtype=np.int16))

    @torch.no_grad()
    def video(self, picture: Array, frames: Array) -> tuple[Tensor, Tensor]:
        """Latents of a still picture held for 73 frames, and of a video after the decoder's warm-up.

        picture uint8 [H, W, 3], frames uint8 [n, H, W, 3] -> [1, 16, 19, h, w] and [1, 16, n / 4, h, w].
        Both streams begin with the same frames. The video is encoded piece by piece, whatever its length.
        """
        still = pixels(picture[None]).to(self._device)
        _, state = self._vae.encode(still, None)
        warm_up = TEMPORAL_STRIDE * (self._preset.stream.decoder_warmup_latents - 1)
        for start in range(0, warm_up, PIECE_FRAMES):
            count = min(PIECE_FRAMES, warm_up - start)
            _, state = self._vae.encode(still.expand(-1, -1, count, -1, -1), state)
        latents = []
        for piece in np.split(frames, range(PIECE_FRAMES, len(frames), PIECE_FRAMES)):
            latent, state = self._vae.encode(pixels(piece).to(self._device), state)
            latents.append(latent)
        return self._vae.encode_still(still, MOTION_LATENTS).cpu(), torch.cat(latents, dim=2).cpu()


def load_encoders(preset: Preset, out: Path) -> ClipEncoder:
    """The frozen networks that a run has trained. Raises `CheckpointError` for files of another preset."""
    networks = meta_networks(preset)
    for part, file in ENCODERS.items():
        load_weights(out / file, networks.parts()[part])
    return ClipEncoder(preset, networks)


def split_folder(out: Path, split: Split) -> Path:
    return out / FOLDER / split.name.lower()


def encode_split(config: TrainingConfig, out: Path, split: Split, count: int, quiet: bool = False) -> None:
    """Makes the data set of a split, `count` clips of `config.data.blocks` blocks, or completes it.

    Raises `CheckpointError` if the existing clips have another identity.
    """
    folder, blocks = split_folder(out, split), config.data.blocks
    _begin(folder, _made_of(config, out, split))
    encoder = load_encoders(config.system, out)
    silence = encoder.silence(blocks)
    write_whole(folder / SILENCE, lambda place: save_file({"silence": silence}, place))
    missing = [index for index in range(count) if not _clip_path(folder, index).exists()]
    for index in tqdm(missing, desc=f"{split.name.lower()} clips", unit="clip", disable=quiet):
        clip = make_clip(split, index, blocks, config.system.stream.height)
        _write_clip(_clip_path(folder, index), encoder.encode(clip, silence))


def _clip_path(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.safetensors"


def _made_of(config: TrainingConfig, out: Path, split: Split) -> dict[str, Any]:
    """The identity of a data set's clips; the first clip represents how clips are drawn."""
    stream = config.system.stream
    first = make_clip(split, 0, 1, stream.height)
    drawn = sha256(first.frames.tobytes() + first.speech.tobytes() + first.prompt.encode()).hexdigest()
    weights = {part: file_sha256(out / file) for part, file in ENCODERS.items()}
    return {"blocks": config.data.blocks, "drawing": drawn, **weights, "stream": dataclasses.asdict(stream)}


def _begin(folder: Path, made_of: Mapping[str, Any]) -> None:
    """Writes the manifest, or compares the existing one."""
    path = folder / MANIFEST
    if path.exists():
        again = f"remove {folder} to make that data set anew"
        check_identity(str(folder), _manifest(path), json.loads(json.dumps(made_of)), again)
        return
    write_json(path, made_of)


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = read_json(path)
        return dict(manifest)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} is no manifest ({error}); remove {path.parent} and make it with --stage data."
        ) from error


def _write_clip(path: Path, clip: EncodedClip) -> None:
    """Writes a clip in float16 (error 5e-4 at size 1), without silence and reference, which other files have."""
    stored = {name: getattr(clip, name).half().contiguous() for name in STORED}
    write_whole(path, lambda place: save_file(stored, place))


class EncodedClips:
    """A data set on the disk, read clip by clip.

    Raises `TrainingError` if it has fewer than `count` clips, with the command that makes them, and `CheckpointError`
    for a damaged file.
    """

    def __init__(self, out: Path, split: Split, count: int) -> None:
        self._folder = split_folder(out, split)
        self._count = count
        last = _clip_path(self._folder, count - 1)
        if not (self._folder / MANIFEST).is_file() or not last.is_file():
            raise TrainingError(
                f"{self._folder} does not hold {count} clips; make them with --stage data and the same --config, --out."
            )
        self._silence = _read(self._folder / SILENCE)["silence"]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> EncodedClip:
        if not 0 <= index < self._count:
            raise IndexError(f"clip {index} is outside 0..{self._count - 1}.")
        stored = {name: tensor.float() for name, tensor in _read(_clip_path(self._folder, index)).items()}
        return EncodedClip(reference=stored["motion"][:, :, :1], silence=self._silence, **stored)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is not a whole clip ({error}); remove it and make it again with --stage data."
        ) from error
