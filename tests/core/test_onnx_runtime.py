"""What ONNX Runtime is not asked to run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from live_avatar.artifacts import Artifacts
from live_avatar.errors import ArtifactError
from live_avatar.runtime.onnx_runtime import OnnxRuntime


def test_bfloat16_is_refused_with_what_to_do(artifacts: Artifacts) -> None:
    low = replace(artifacts, preset=artifacts.preset.with_precision("bfloat16"))
    message = r"is in bfloat16, which ONNX Runtime does not run on a CPU; export it with --precision float32, or serve"
    with pytest.raises(ArtifactError, match=message):
        OnnxRuntime(low)
