"""NVIDIA's perf_analyzer, for the tests that measure with it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from perf import analyzer


@pytest.fixture(scope="session")
def real_program() -> Path:
    """Its path; fetched if need be."""
    done = subprocess.run([analyzer.GET], cwd=analyzer.PLACE.parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())
