"""Encoded clips are what a stream is conditioned on, and a data set is of one making only."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from live_avatar.errors import CheckpointError
from live_avatar.pipeline.avatar import AvatarEncoder
from live_avatar.pipeline.conditioning import Conditioner
from live_avatar.runtime.torch_runtime import TorchRuntime
from live_avatar.weights.checkpoint import load_networks, open_checkpoint
from tests.tolerances import STREAMED
from tests.training.conftest import SMALL, Heard, toy_config
from training.checkpoints import save_weights
from training.data.clips import Clip, Split, make_clip
from training.encoded import (
    ENCODERS,
    STORED,
    ClipEncoder,
    EncodedClip,
    EncodedClips,
    encode_split,
    pixels,
    split_folder,
)
from training.errors import TrainingError
from training.evaluate import png

BLOCKS = SMALL.stream.speech_window_blocks + 2
CHECKPOINT = open_checkpoint(SMALL)


@pytest.fixture(scope="module")
def clip() -> Clip:
    """Longer than the speech encoder's window, and it speaks."""
    return make_clip(Split.TRAIN, 0, BLOCKS, SMALL.stream.height)


@pytest.fixture(scope="module")
def encoder() -> ClipEncoder:
    return ClipEncoder(SMALL, load_networks(CHECKPOINT))


@pytest.fixture(scope="module")
def encoded(encoder: ClipEncoder, clip: Clip) -> EncodedClip:
    return encoder.encode(clip, encoder.silence(BLOCKS))


def assert_close(ours: Any, expected: Any) -> None:
    ours, expected = torch.as_tensor(ours), torch.as_tensor(expected)
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= STREAMED * expected.abs().max()


def test_a_clip_is_encoded_as_a_stream_is_conditioned(clip: Clip, encoded: EncodedClip) -> None:
    runtime = Heard(TorchRuntime(CHECKPOINT))
    conditioner = Conditioner(runtime)
    source = AvatarEncoder(runtime).encode_image(png(clip.picture), clip.prompt)
    assert_close(encoded.reference, source.reference)
    assert_close(encoded.motion, source.motion)
    assert_close(encoded.text, source.text)
    state = conditioner.open(seed=0)
    for samples in clip.speech.reshape(BLOCKS, -1):
        conditioner.block(state, samples)
    assert clip.speech.any()
    assert_close(encoded.states, np.stack(runtime.states))


def test_silence_is_the_state_of_a_stream_without_sound(encoder: ClipEncoder, encoded: EncodedClip) -> None:
    assert_close(encoded.silence, encoder.states(np.zeros(BLOCKS * SMALL.stream.block_samples, np.int16)))
    assert (encoded.silence - encoded.states).abs().max() > 0.1


def test_latents_are_those_of_a_stream_after_its_warm_up(clip: Clip, encoded: EncodedClip) -> None:
    """Frame by frame as the format has it: one, then four at a time."""
    vae = load_networks(CHECKPOINT).vae
    warm_up = SMALL.stream.decoder_warmup_latents
    still, video = pixels(clip.picture[None]), pixels(clip.frames)
    with torch.no_grad():
        _, state = vae.encode(still, None)
        for _ in range(warm_up - 1):
            _, state = vae.encode(still.expand(-1, -1, 4, -1, -1), state)
        latents = []
        for piece in video.split(4, dim=2):
            latent, state = vae.encode(piece, state)
            latents.append(latent)
    assert_close(encoded.latents, torch.cat(latents, dim=2))


@pytest.fixture
def out(tmp_path: Path, small: None) -> Path:
    """A run's folder with the frozen networks in it."""
    parts = load_networks(CHECKPOINT).parts()
    for part, file in ENCODERS.items():
        save_weights(tmp_path / file, parts[part].state_dict())
    return tmp_path


def encode(out: Path, count: int = 2, **changes: Any) -> None:
    encode_split(toy_config(**changes), out, Split.TRAIN, count, quiet=True)


def test_a_data_set_gives_its_clips(out: Path) -> None:
    encode(out)
    clips = EncodedClips(out, Split.TRAIN, 2)
    encoder = ClipEncoder(SMALL, load_networks(CHECKPOINT))
    expected = encoder.encode(make_clip(Split.TRAIN, 1, 2, SMALL.stream.height), encoder.silence(2))
    assert len(clips) == 2
    for name in ("reference", "silence", *STORED):
        ours, theirs = getattr(clips[1], name), getattr(expected, name)
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() <= torch.finfo(torch.float16).eps * theirs.abs().max(), name
    with pytest.raises(IndexError, match=r"clip 2 is outside 0\.\.1"):
        clips[2]


def test_a_half_made_data_set_is_continued(out: Path) -> None:
    encode(out)
    kept, lost = (split_folder(out, Split.TRAIN) / f"00000{index}.safetensors" for index in range(2))
    whole, stamp = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    encode(out, count=3)
    assert kept.stat().st_mtime_ns == stamp
    assert lost.read_bytes() == whole
    assert len(EncodedClips(out, Split.TRAIN, 3)) == 3


def test_a_data_set_of_another_making_is_refused(out: Path) -> None:
    encode(out)
    folder = split_folder(out, Split.TRAIN)
    longer = dataclasses.replace(toy_config().data, blocks=3)
    with pytest.raises(CheckpointError, match=rf"{folder} was made with blocks 2, but this run has 3; remove {folder}"):
        encode(out, data=longer)
    vae = load_networks(CHECKPOINT).vae.state_dict()
    save_weights(out / ENCODERS["vae"], {name: 2 * tensor for name, tensor in vae.items()})
    with pytest.raises(CheckpointError, match=rf"{folder} was made with vae '[0-9a-f]+', but this run has '"):
        encode(out)


def test_clips_that_are_not_there_name_the_stage_that_makes_them(out: Path) -> None:
    with pytest.raises(TrainingError, match=r"train does not hold 2 clips; make them with --stage data and the same"):
        EncodedClips(out, Split.TRAIN, 2)
    encode(out, count=1)
    with pytest.raises(TrainingError, match="train does not hold 2 clips"):
        EncodedClips(out, Split.TRAIN, 2)


def test_damaged_files_are_named(out: Path) -> None:
    encode(out)
    folder = split_folder(out, Split.TRAIN)
    (folder / "000001.safetensors").write_bytes(b"no clip")
    clips = EncodedClips(out, Split.TRAIN, 2)
    with pytest.raises(CheckpointError, match=r"000001.safetensors is not a whole clip \(.+\); remove it and make it"):
        clips[1]
    (folder / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest.json is no manifest \(.+\); remove .+train and make it with"):
        encode(out)
