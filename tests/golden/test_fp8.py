"""The quantizer of the released code, to the bit, and a linear of quantized operands (golden `fp8`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from live_avatar.model.linears import is_fp8_in_release
from live_avatar.weights import fp8
from tests.golden.conftest import Golden
from tests.tolerances import FLOAT32


@pytest.fixture(scope="module")
def golden(golden_dir: Path) -> Golden:
    return Golden(golden_dir, "fp8.safetensors")


@pytest.mark.parametrize("name", ["x", "weight"])
def test_bytes_and_scales_are_those_of_the_release(golden: Golden, name: str) -> None:
    quantized, inverse = fp8.quantize(golden[f"in/{name}"])
    assert quantized.dtype == torch.float8_e4m3fn
    assert torch.equal(quantized.view(torch.uint8), golden[f"{name}_fp8_bytes"])
    assert inverse == golden[f"{name}_scale_inv"]


def test_the_golden_covers_both_sides_of_the_factors_cap(golden: Golden) -> None:
    assert golden["in/weight"].abs().max() < 1 < golden["in/x"].abs().max()


def test_a_linear_of_quantized_operands(golden: Golden) -> None:
    product = F.linear(fp8.fake_quantize(golden["in/x"]), fp8.fake_quantize(golden["in/weight"]), golden["in/bias"])
    golden.check("y_exact", product, FLOAT32)


def test_nothing_becomes_nan_or_infinite() -> None:
    quantized, inverse = fp8.quantize(torch.zeros(3))
    assert torch.equal(fp8.dequantize(quantized, inverse), torch.zeros(3))
    assert torch.equal(fp8.saturate(torch.tensor([1e9, -500.0, 0.5])).float(), torch.tensor([448.0, -448.0, 0.5]))


@pytest.mark.parametrize(
    ("linear", "quantized"),
    [
        ("blocks.0.self_attn.q", True),
        ("blocks.39.ffn.2", True),
        ("audio_injector.injector.3.o", True),
        ("audio_injector.injector_adain_layers.3.linear", True),
        ("text_embedding.0", False),
        ("time_projection.1", False),
        ("head.head", False),
        ("casual_audio_encoder.encoder.final_linear", False),
    ],
)
def test_which_linears_the_release_quantizes(linear: str, quantized: bool) -> None:
    assert is_fp8_in_release(linear) is quantized
