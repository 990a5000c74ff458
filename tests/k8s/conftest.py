"""Says once what is missing on this machine, before the first test marked k8s would."""

from __future__ import annotations

import pytest

from tests.k8s.programs import missing


def pytest_collection_finish(session: pytest.Session) -> None:
    if any(item.get_closest_marker("k8s") for item in session.items) and missing():
        pytest.exit(missing(), returncode=pytest.ExitCode.USAGE_ERROR)
