"""Golden data: numbers made with the official classes (spec section 19).

`pytest tests/golden --golden DIR` runs the same tests on another folder of that format; every size comes
from its config.json and tensors. The largest error per file is printed at the end of the run.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from live_avatar.config import DiTConfig, VAEConfig
from live_avatar.model.dit import CausalDiT
from live_avatar.model.vae import VAE

COLUMNS = 12  # feature columns of a block
DATA = Path(__file__).parent / "data"
LARGEST_ERROR: dict[str, dict[str, float]] = defaultdict(dict)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", default=str(DATA), metavar="DIR", help="folder of golden data")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if LARGEST_ERROR:
        terminalreporter.section("golden data: largest absolute error")
        for file, groups in sorted(LARGEST_ERROR.items()):
            for group, error in sorted(groups.items()):
                terminalreporter.write_line(f"{file:24} {group:28} {error:.2e}")


class Golden:
    """One safetensors file, read tensor by tensor; `check` compares and remembers the error."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self._file = safe_open(folder / name, framework="pt")
        self.keys = set(self._file.keys())
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def __getitem__(self, key: str) -> Tensor:
        return self._file.get_tensor(key)

    def array(self, key: str) -> np.ndarray:
        return self[key].numpy()

    def all(self) -> dict[str, Tensor]:
        return {key: self[key] for key in self.keys}

    def check(self, key: str, ours: Tensor | np.ndarray, tolerance: float) -> None:
        expected = self[key]
        got = torch.as_tensor(np.ascontiguousarray(ours)) if isinstance(ours, np.ndarray) else ours
        assert got.numel() == expected.numel(), f"{key}: {tuple(got.shape)} for {tuple(expected.shape)}"
        error = (got.reshape(expected.shape).double() - expected.double()).abs().max().item()
        group = key.split("/")[0]
        LARGEST_ERROR[self.name][group] = max(error, LARGEST_ERROR[self.name].get(group, 0.0))
        assert error <= tolerance, f"{self.name} {key}: largest error {error:.3e}, tolerance {tolerance:.0e}"


@pytest.fixture(scope="session")
def golden_dir(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.getoption("--golden"))


@pytest.fixture(scope="session")
def golden_config(golden_dir: Path) -> dict[str, Any]:
    return json.loads((golden_dir / "config.json").read_text())


def _file_fixture(name: str) -> Any:
    @pytest.fixture(scope="session", name=name)
    def fixture(golden_dir: Path) -> Golden:
        return Golden(golden_dir, f"{name}.safetensors")

    return fixture


dit_step = _file_fixture("dit_step")
dit_debug = _file_fixture("dit_debug")
dit_extra = _file_fixture("dit_extra")
rollout = _file_fixture("rollout")
audio = _file_fixture("audio")
lora = _file_fixture("lora")
lora_out = _file_fixture("lora_out")
vae = _file_fixture("vae")


@pytest.fixture(scope="session")
def dit(golden_dir: Path, golden_config: dict[str, Any]) -> CausalDiT:
    values = golden_config["dit"]
    weights = Golden(golden_dir, "dit_weights.safetensors").all()
    names = (
        "dim",
        "num_heads",
        "num_layers",
        "ffn_dim",
        "text_dim",
        "text_len",
        "audio_dim",
        "num_audio_token",
    )
    config = DiTConfig(
        **{name: values[name] for name in (*names, "freq_dim", "in_dim", "cond_dim", "eps")},
        audio_states=weights["casual_audio_encoder.weights"].shape[1],
        audio_inject_layers=tuple(values["audio_inject_layers"]),
    )
    model = CausalDiT(config)
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def vae_model(golden_dir: Path, golden_config: dict[str, Any]) -> VAE:
    values = golden_config["vae"]
    model = VAE(
        VAEConfig(
            dim=values["dim"],
            z_dim=values["z_dim"],
            dim_mult=tuple(values["dim_mult"]),
            num_res_blocks=values["num_res_blocks"],
            temporal_downsample=tuple(values["temperal_downsample"]),
        )
    )
    model.load_state_dict(Golden(golden_dir, "vae_weights.safetensors").all())
    return model.eval().requires_grad_(False)
