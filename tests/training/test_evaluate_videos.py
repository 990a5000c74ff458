"""The command on drawn faces: the paper's table from tiny random networks, and the right order of known videos."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

from live_avatar_client.media import Mp4Writer
from tests.support.films import grey_frames, write_video
from training.data.clips import Clip, Split, make_clip
from training.evaluate_videos import main
from training.films import write_film
from training.videos.footage import frames_of, open_footage
from training.videos.syncnet import SyncNet
from training.videos.weights import DINO, I3D, INCEPTION, SOURCES, SYNCNET, viewed

BLOCKS = 12
SIDE = 64


class TinyInception(nn.Module):
    """Takes what the released TorchScript file takes."""

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        assert return_features
        return x.float().mean([2, 3])


class TinyI3D(nn.Module):
    def forward(self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False) -> Tensor:
        assert not rescale
        assert not resize
        return torch.cat([x.mean([2, 3, 4]), x.std([2, 3, 4])], 1)


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return [make_clip(Split.TEST, seed, BLOCKS, SIDE) for seed in (0, 1)]


@pytest.fixture(scope="module")
def reference(clips: list[Clip], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    for number, clip in enumerate(clips):
        write_film(folder / f"face-{number}.mp4", clip)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ViTConfig, ViTModel

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(TinyInception()).save(str(folder / INCEPTION))
        torch.jit.script(TinyI3D()).save(str(folder / I3D))
    tiny = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, patch_size=56)
    ViTModel(tiny, add_pooling_layer=False).save_pretrained(folder / DINO)
    return folder


def write_generated(folder: Path, clips: list[Clip], number: int = 0, late: int = 0) -> Path:
    """The films with the sound of `number` clips further, and the picture `late` frames late; a little darker."""
    folder.mkdir()
    for index, clip in enumerate(clips):
        frames = (np.concatenate([clip.frames[:1].repeat(late, 0), clip.frames])[: len(clip.frames)] * 0.9).astype(
            np.uint8
        )
        speech = clips[(index + number) % len(clips)].speech
        with Mp4Writer(folder / f"face-{index}.mp4", SIDE, SIDE, speech=speech) as file:
            file.write(frames)
    return folder


def evaluated(*options: object) -> Result:
    return CliRunner().invoke(main, [str(one) for one in options])


def means(report: Path) -> dict[str, Any]:
    (segment,) = json.loads(report.read_text())["segments"]
    mean: dict[str, Any] = segment["mean"]
    return mean


def test_without_weights_the_rest_is_measured_and_the_missing_files_are_named(
    clips: list[Clip], reference: Path, tmp_path: Path
) -> None:
    generated = write_generated(tmp_path / "generated", clips)
    report, given = tmp_path / "report.json", tmp_path / "given.json"
    given.write_text('{"FPS": 26.5, "TTFF": 1.25}')
    done = evaluated("--generated", generated, "--reference", reference, "--report", report, "--figures", given)
    assert done.exit_code == 0, done.output
    heads, _, row = done.stdout.splitlines()
    assert heads.startswith(
        "| segment | videos | ASE ↑ | IQA ↑ | Sync-C ↑ | Sync-D ↓ | Dino-S ↑ | FID ↓ | FVD ↓ | FPS ↑ |"
    )
    assert row.startswith("| 0-10 s | 2 | - | - | - | - | - | - | - | 26.500 | 1.250 | ")
    assert done.stderr.count("Not measured: ") == len(SOURCES)
    for name, source in SOURCES.items():
        assert f"Not measured: {name} is not in --weights. It comes from: {source}." in done.stderr
    found = means(report)
    assert 20 < found["PSNR"] < 40
    assert 0.8 < found["SSIM"] < 1
    assert found["looks"] > 0.95
    assert found["colour"] > 10


@pytest.mark.slow
def test_in_sync_is_better_than_late_or_another_clips_sound(clips: list[Clip], reference: Path, tmp_path: Path) -> None:
    known = {"own": (0, 0), "late": (0, 3), "other": (1, 0)}
    mouth = {}
    for name, (number, late) in known.items():
        generated, report = write_generated(tmp_path / name, clips, number, late), tmp_path / f"{name}.json"
        done = evaluated("--generated", generated, "--reference", reference, "--report", report)
        assert done.exit_code == 0, done.output
        mouth[name] = means(report)["mouth"]
    assert mouth["own"] > max(mouth["late"], mouth["other"]) + 0.05


def test_networks_of_local_files_fill_the_papers_columns(
    clips: list[Clip], reference: Path, weights: Path, tmp_path: Path
) -> None:
    """FID, FVD and Dino-S against plain computations on the same frames."""
    generated, report = write_generated(tmp_path / "generated", clips[:1]), tmp_path / "report.json"
    true = tmp_path / "true"
    true.mkdir()
    for name in ("face-0.mp4", "face-0.png"):
        (true / name).write_bytes((reference / name).read_bytes())
    done = evaluated("--generated", generated, "--reference", true, "--weights", weights, "--report", report,
                     "--seconds", "1.28")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert done.stderr.count("Not measured") == 1
    assert f"Not measured: {SYNCNET} is not in --weights. It comes from: {SOURCES[SYNCNET]}." in done.stderr
    found = means(report)
    videos = [frames(folder / "face-0.mp4", 32) for folder in (generated, true)]
    assert found["FID"] == pytest.approx(plain_frechet(*(one.mean((1, 2)) for one in videos)), rel=1e-3)
    assert found["FVD"] == pytest.approx(plain_frechet(*map(i3d, videos)), rel=1e-2, abs=1e-4)
    assert 0.5 < found["Dino-S"] < 1
    assert found["ASE"] is found["IQA"] is found["Sync-C"] is None


def test_syncnet_fills_its_columns(clips: list[Clip], reference: Path, tmp_path: Path) -> None:
    """On the shortest video that is measured."""
    clip = clips[0]
    short = dataclasses.replace(clip, frames=clip.frames[:16], speech=clip.speech[: 16 * 640])
    generated, report = write_generated(tmp_path / "generated", [short]), tmp_path / "report.json"
    torch.save(SyncNet(width=4).state_dict(), tmp_path / SYNCNET)
    done = evaluated("--generated", generated, "--reference", reference, "--weights", tmp_path, "--report", report)
    assert done.exit_code == 0, done.output
    assert means(report)["Sync-D"] > 0 <= means(report)["Sync-C"]


def frames(path: Path, count: int) -> Any:
    return np.stack(list(frames_of(open_footage(path), SIDE, SIDE, 0, count)))


def i3d(video: Any) -> Any:
    seen = viewed(video).numpy() / 127.5 - 1
    runs = [seen[start : start + 16].transpose(1, 0, 2, 3).reshape(3, -1) for start in (0, 16)]
    return np.stack([np.concatenate([run.mean(1), run.std(1, ddof=1)]) for run in runs])


def plain_frechet(ours: Any, theirs: Any) -> float:
    """With the root of the product of the covariances from its own eigenvalues."""
    covariances = [np.cov(one.T) for one in (ours, theirs)]
    root = np.sqrt(np.maximum(np.linalg.eigvals(covariances[0] @ covariances[1]).real, 0)).sum()
    apart = np.square(ours.mean(0) - theirs.mean(0)).sum()
    return float(apart + sum(map(np.trace, covariances)) - 2 * root)


def test_segments_of_a_long_stream_are_measured_where_they_are(reference: Path, tmp_path: Path) -> None:
    """5.76 s: the segments at 0, 2 and 4 s exist, the one at 5 s does not."""
    generated = tmp_path / "generated"
    generated.mkdir()
    (generated / "face-0.mp4").write_bytes((reference / "face-0.mp4").read_bytes())
    report = tmp_path / "report.json"
    done = evaluated("--generated", generated, "--reference", reference, "--starts", "0,2,4,5", "--seconds", "1",
                     "--report", report)  # fmt: skip
    assert done.exit_code == 0, done.output
    segments = json.loads(report.read_text())["segments"]
    assert [one["start_s"] for one in segments] == [0, 2, 4]
    assert all(one["mean"]["PSNR"] == 100 for one in segments)
    assert len({one["mean"]["colour"] for one in segments}) == 3


def test_what_cannot_be_compared_is_refused(reference: Path, tmp_path: Path) -> None:
    generated = tmp_path / "generated"
    generated.mkdir()
    write_video(generated / "who.mkv", grey_frames([9] * 30, 64, 64), None, {"eng": np.ones(30 * 640, np.int16)})
    done = evaluated("--generated", generated, "--reference", reference)
    assert done.exit_code == 2
    assert done.stderr == (
        f"Error: {generated / 'who.mkv'} has no video of the same name in {reference}; add it, or leave it out.\n"
    )
    same = evaluated("--generated", reference, "--reference", reference)
    assert f"--generated and --reference are both {reference}; give two folders." in same.stderr
    short = tmp_path / "short"
    short.mkdir()
    write_video(short / "face-0.mkv", grey_frames([9] * 5, 64, 64), None, {"eng": np.ones(5 * 640, np.int16)})
    few = evaluated("--generated", short, "--reference", reference)
    assert "no generated video has 16 frames with sound; give longer ones, or an earlier --starts." in few.stderr
    assert (
        "'0,x' is no list of whole seconds"
        in evaluated("--generated", short, "--reference", reference, "--starts", "0,x").stderr
    )


@pytest.mark.parametrize("name", [INCEPTION, SYNCNET, DINO])
def test_a_file_of_weights_that_is_another_one_is_named(reference: Path, tmp_path: Path, name: str) -> None:
    folder, short = tmp_path / "weights", tmp_path / "short"
    folder.mkdir()
    (folder / name).write_text("no weights")
    done = evaluated("--generated", short, "--reference", reference, "--weights", folder)
    assert done.exit_code == 2
    assert str(folder / name) in done.stderr
    assert "Traceback" not in done.output


def test_given_figures_of_other_columns_are_refused(reference: Path, tmp_path: Path) -> None:
    given = tmp_path / "given.json"
    given.write_text('{"FID": 3}')
    done = evaluated("--generated", tmp_path, "--reference", reference, "--figures", given)
    assert "given.json holds {'FID': 3}; expected an object of numbers with keys of ASE, IQA, FPS, TTFF." in done.stderr
