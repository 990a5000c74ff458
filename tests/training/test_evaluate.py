"""The measures of a trained avatar, on frames whose figures are known; the networks here are untrained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from live_avatar.arrays import Array
from live_avatar.pipeline.generator import Generator
from live_avatar.runtime.torch_runtime import TorchRuntime
from live_avatar.weights.checkpoint import open_checkpoint
from tests.training.conftest import SMALL
from training.data.clips import Clip, Split, make_clip
from training.evaluate import (
    SHEET_FRAMES,
    GeneratedClip,
    by,
    contact_sheet,
    lip_sync,
    long_stream,
    looks,
    main,
    spoken_clips,
    spread,
)

BLOCKS = 6
SIDE = 96


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return spoken_clips(3, BLOCKS, SIDE)


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(TorchRuntime(open_checkpoint(SMALL)))


def test_clips_are_of_the_test_split_and_speak(clips: list[Clip]) -> None:
    drawn = [make_clip(Split.TEST, seed, BLOCKS, SIDE) for seed in range(8)]
    assert all(any(np.array_equal(clip.frames, one.frames) for one in drawn) for clip in clips)
    assert all(clip.speech.any() and clip.mouth[:, 0].std() > 0 for clip in clips)


def test_the_truth_has_the_rulers_figures(clips: list[Clip]) -> None:
    figures = lip_sync([GeneratedClip(clip, clip.frames) for clip in clips])
    assert figures["opening"] == figures["ruler"]
    assert figures["opening"]["mean"] > 0.9
    assert figures["best_lag_frames"] == {"median": 0.0, "each": [0, 0, 0]}
    assert abs(figures["shuffled"]["mean"]) < 0.5
    assert abs(figures["chance"]["mean"]) < 0.5


def test_late_frames_are_found_late(clips: list[Clip]) -> None:
    takes = [
        GeneratedClip(clip, np.concatenate([np.repeat(clip.picture[None], 2, axis=0), clip.frames[:-2]]))
        for clip in clips
    ]
    figures = lip_sync(takes)
    assert figures["best_lag_frames"]["each"] == [2, 2, 2]
    assert figures["opening"]["mean"] < figures["ruler"]["mean"]


def test_a_still_picture_follows_nobody(clips: list[Clip]) -> None:
    stills = [GeneratedClip(clip, np.repeat(clip.picture[None], len(clip.frames), axis=0)) for clip in clips]
    figures = lip_sync(stills)
    assert figures["opening"]["each"] == [0.0, 0.0, 0.0]
    assert looks(stills)["generated"]["mean"] == 0.0
    assert looks(stills)["truth"]["mean"] > 0.1


def test_looks_of_another_face_are_far(clips: list[Clip]) -> None:
    others = [GeneratedClip(clip, other.frames) for clip, other in zip(clips, clips[1:] + clips[:1], strict=True)]
    figures = looks(others)
    assert figures["generated"]["mean"] > 5 * figures["truth"]["mean"]


def test_a_clip_is_generated_frame_for_frame(generator: Generator) -> None:
    clip = make_clip(Split.TEST, 0, 2, SMALL.stream.height)
    frames = by(generator)(clip, 1)
    assert frames.shape == clip.frames.shape
    assert frames.dtype == np.uint8
    assert not np.array_equal(frames, by(generator)(clip, 2))


class Coloured:
    """A stream of one colour that changes after two seconds; not a model, a signal to measure."""

    def __init__(self, picture: Array) -> None:
        self.preset = SMALL
        self._picture = picture

    def stream(self, image: bytes, prompt: str, seed: int, blocks: Iterator[Array]) -> Iterator[object]:
        for index, block in enumerate(blocks):
            assert block.shape == (SMALL.stream.block_samples,)
            first = index * 12
            shift = [30 * (frame >= 50) for frame in range(first, first + 12)]
            frames = np.stack([np.clip(self._picture.astype(int) + one, 0, 255) for one in shift]).astype(np.uint8)
            yield type("Block", (), {"frames": frames})()


def test_parts_of_a_long_stream_are_measured_where_they_are(clips: list[Clip]) -> None:
    source = Coloured(np.full_like(clips[0].picture, 100))
    clip = replace(clips[0], picture=np.full_like(clips[0].picture, 100))
    made = long_stream(source, clip, 0, [(0, 2), (2, 4)])  # type: ignore[arg-type]
    assert made[0] == {"seconds": [0, 2], "mean": 0.0, "sd": 0.0}
    assert made[1]["seconds"] == [2, 4]
    assert made[1]["mean"] == pytest.approx(30 * 3**0.5, rel=1e-3)


def test_a_spread_is_that_of_a_sample() -> None:
    assert spread([1.0, 3.0]) == {"mean": 2.0, "sd": 1.4142, "each": [1.0, 3.0]}
    assert spread([1.0])["sd"] == 0.0


def test_the_contact_sheet_has_truth_above_what_was_generated(clips: list[Clip]) -> None:
    dark = [GeneratedClip(clip, np.zeros_like(clip.frames)) for clip in clips[:2]]
    sheet = np.asarray(contact_sheet(dark))
    assert sheet.shape == (4 * SIDE, SHEET_FRAMES * SIDE, 3)
    rows = sheet.reshape(4, SIDE, -1).any(axis=(1, 2))
    assert rows.tolist() == [True, False, True, False]
    moment = sheet[:SIDE, :SIDE]
    assert any(np.array_equal(moment, frame) for frame in clips[0].frames)


def test_artifacts_that_are_not_there_end_with_a_sentence(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["--artifacts", str(tmp_path / "none")])
    assert done.exit_code == 2
    assert done.stderr.startswith(f"Error: artifacts folder {tmp_path / 'none'} does not exist; make it with")


@pytest.mark.slow
def test_the_command_measures_exported_artifacts(artifacts: object, tmp_path: Path) -> None:
    """On random weights: the figures mean nothing, but they are all there."""
    folder = artifacts.folder  # type: ignore[attr-defined]
    report, sheet = tmp_path / "report.json", tmp_path / "sheet.png"
    options = ["--clips", "2", "--blocks", "3", "--streams", "0", "--report", str(report), "--sheet", str(sheet)]
    done = CliRunner().invoke(main, ["--artifacts", str(folder), *options])
    assert done.exit_code == 0, done.output
    figures = json.loads(report.read_text())
    assert set(figures) == {"clips", "seconds_each", "lip_sync", "looks", "long_streams", "environment"}
    assert figures["lip_sync"]["ruler"]["mean"] > 0.9
    with Image.open(sheet) as picture:
        assert picture.size == (SHEET_FRAMES * 96, 4 * 96)
