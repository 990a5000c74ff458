"""SyncNet's front end, network and figures against independent computations; its weights are random here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from live_avatar.errors import CheckpointError, InputError
from tests.tolerances import FLOAT32
from training.videos.syncnet import SyncNet, figures, load_syncnet, measure_sync, mfcc

# Columns 0, 50 and 98 of a chirp, from mfcc of python_speech_features 0.6 with its defaults.
CHIRP = [
    [17.9021, 21.7479, 22.6342], [24.8478, 1.6994, -16.262], [15.9996, -36.7589, -17.9274], [9.2587, -3.1793, 32.9892],
    [1.5916, 31.4896, -25.5284], [-6.9337, -0.15, -6.1513], [-13.8826, -33.701, 29.4643], [-19.64, -4.5464, -27.7725],
    [-22.1894, 26.5371, 0.3202], [-22.0125, -0.914, 21.8738], [-18.6415, -28.2203, -26.2489],
    [-14.043, -4.9126, 5.8799], [-8.7964, 18.1948, 13.0695],
]  # fmt: skip


@pytest.fixture(scope="module")
def network() -> SyncNet:
    torch.manual_seed(0)
    network = SyncNet(width=8).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d | torch.nn.BatchNorm3d):
            module.running_mean.normal_(std=0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return network


def test_the_front_end_gives_the_numbers_of_the_original() -> None:
    times = np.arange(16_000) / 16_000
    chirp = (8000 * np.sin(2 * np.pi * (200 + 1500 * times) * times)).astype(np.int16)
    made = mfcc(chirp)
    assert made.shape == (13, 99)
    assert made[:, [0, 50, 98]] == pytest.approx(np.array(CHIRP), abs=1e-4)
    assert np.isfinite(mfcc(np.zeros(3200, np.int16))).all()


@torch.no_grad()
def test_speech_is_embedded_as_the_layers_of_the_file_say(network: SyncNet) -> None:
    """Layer by layer from the parameters alone, under the names that the released file has."""
    state = network.state_dict()

    def layer(x: torch.Tensor, conv: int, padding: tuple[int, int]) -> torch.Tensor:
        name, norm = f"netcnnaud.{conv}", f"netcnnaud.{conv + 1}"
        x = F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=padding)
        return F.relu(
            F.batch_norm(x, *(state[f"{norm}.{one}"] for one in ("running_mean", "running_var", "weight", "bias")))
        )

    columns = torch.randn(2, 1, 13, 20, generator=torch.Generator().manual_seed(1))
    x = layer(columns, 0, (1, 1))
    x = F.max_pool2d(layer(x, 4, (1, 1)), (3, 3), (1, 2))
    x = layer(layer(x, 8, (1, 1)), 11, (1, 1))
    x = F.max_pool2d(layer(x, 14, (1, 1)), (3, 3), (2, 2))
    x = layer(x, 18, (0, 0)).flatten(1)
    x = F.linear(x, state["netfcaud.0.weight"], state["netfcaud.0.bias"])
    x = F.batch_norm(x, *(state[f"netfcaud.1.{one}"] for one in ("running_mean", "running_var", "weight", "bias")))
    x = F.linear(F.relu(x), state["netfcaud.3.weight"], state["netfcaud.3.bias"])
    assert (network.speech(columns) - x).abs().max() < FLOAT32 * x.abs().max()


def test_figures_are_the_distances_at_every_offset() -> None:
    random = torch.Generator().manual_seed(2)
    lips, heard = torch.randn(12, 5, generator=random), torch.randn(12, 5, generator=random)
    means = []
    for shift in range(-3, 4):
        distances = []
        for frame in range(12):
            there = 0 <= frame + shift < 12
            other = heard[frame + shift] if there else torch.zeros(5)
            distances.append(float((lips[frame] - other + 1e-6).square().sum().sqrt()))
        means.append(np.mean(distances))
    found = figures(lips, heard, 3)
    assert found.distance == pytest.approx(min(means), rel=1e-5)
    assert found.confidence == pytest.approx(np.median(means) - min(means), rel=1e-4)
    assert found.offset == 3 - int(np.argmin(means))


@pytest.mark.parametrize("late", [-3, 0, 3])
def test_the_offset_says_by_how_many_frames_the_picture_is_late(late: int) -> None:
    """In sync is nearer and surer than another clip's sound; shifted by 3 frames is found, at the same distance."""
    random = torch.Generator().manual_seed(3)
    spoken = torch.randn(60, 16, generator=random)
    lips, heard = spoken[10 - late : 50 - late], spoken[10:50]
    found = figures(lips, heard, 5)
    assert found.offset == late
    other = figures(lips, torch.randn(40, 16, generator=random), 5)
    assert found.confidence > 5 * other.confidence
    assert found.distance < other.distance / 2


def test_a_clip_is_measured_window_by_window(network: SyncNet) -> None:
    random = np.random.default_rng(4)
    faces = random.integers(0, 256, (7, 224, 224, 3), dtype=np.uint8)
    speech = random.integers(-8000, 8000, 7 * 640).astype(np.int16)
    found = measure_sync(network, faces, speech, most_offset=1)
    columns = torch.from_numpy(mfcc(speech)).float()
    with torch.no_grad():
        windows = [
            torch.from_numpy(faces[i : i + 5, :, :, ::-1].copy()).permute(3, 0, 1, 2)[None].float() for i in (0, 1)
        ]
        lips = torch.cat([network.lips(window) for window in windows])
        heard = torch.cat([network.speech(columns[None, None, :, 4 * i : 4 * i + 20]) for i in (0, 1)])
    expected = figures(lips, heard, 1)
    assert found.offset == expected.offset
    assert found.distance == pytest.approx(expected.distance, rel=1e-4)
    assert found.confidence == pytest.approx(expected.confidence, abs=1e-4)


def test_too_few_frames_are_refused(network: SyncNet) -> None:
    with pytest.raises(InputError, match=r"5 frames are too few for SyncNet; give at least 6\."):
        measure_sync(network, np.zeros((5, 224, 224, 3), np.uint8), np.zeros(3200, np.int16))


def test_a_file_is_loaded_without_running_code(network: SyncNet, tmp_path: Path) -> None:
    path = tmp_path / "syncnet_v2.model"
    torch.save(network.state_dict(), path)
    columns = torch.ones(1, 1, 13, 20)
    with torch.no_grad():
        assert torch.equal(load_syncnet(path).speech(columns), network.speech(columns))
    for content in (b"", b"no weights"):
        path.write_bytes(content)
        with pytest.raises(
            CheckpointError, match=r"syncnet_v2.model does not hold the weights of SyncNet \(.+\); fetch"
        ):
            load_syncnet(path)
    torch.save({"netfclip.3.weight": torch.zeros(8, 512)}, path)
    with pytest.raises(CheckpointError, match=r"does not hold the weights of SyncNet"):
        load_syncnet(path)
