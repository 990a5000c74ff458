"""checkov's policies hold for what is applied to a cluster and for the Dockerfiles, but where k8s/checkov.yaml argues.

Each folder is looked at alone, as it is applied alone.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.manifests import APPLIED, K8S, ROOT, Object, build, pod_of, the
from tests.k8s.programs import checkov

pytestmark = pytest.mark.k8s

CONFIGURATION = K8S / "checkov.yaml"
DOCKER = "docker"

Failed = Callable[[str], set[str]]


def failed_checks(folder: Path, configuration: Path) -> set[str]:
    """Ids of the checks that fail for something in the folder. Fails if nothing was checked."""
    command = [checkov(), f"--config-file={configuration}", "--directory", folder, "--output=json", "--soft-fail"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    said = json.loads(result.stdout)
    reports: list[dict[str, Any]] = said if isinstance(said, list) else [said]
    assert sum(report["summary"]["passed"] for report in reports if "summary" in report) > 50, result.stdout
    return {found["check_id"] for report in reports for found in report["results"]["failed_checks"]}


def write(objects: list[Object], folder: Path) -> Path:
    (folder / "objects.yaml").write_text(yaml.safe_dump_all(objects))
    return folder


def exceptions() -> set[str]:
    return set(yaml.safe_load(CONFIGURATION.read_text())["skip-check"])


@pytest.fixture(scope="module")
def without_exceptions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration, with nothing skipped."""
    settings = yaml.safe_load(CONFIGURATION.read_text())
    del settings["skip-check"]
    path = tmp_path_factory.mktemp("checkov") / "checkov.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory, without_exceptions: Path) -> Failed:
    """What fails in a folder of k8s/, or in docker/."""

    @cache
    def failed(name: str) -> set[str]:
        folder = ROOT / DOCKER if name == DOCKER else write(build(K8S / name), tmp_path_factory.mktemp("built"))
        return failed_checks(folder, without_exceptions)

    return failed


@pytest.mark.parametrize("name", [*APPLIED, DOCKER])
def test_nothing_fails_but_what_is_argued(failed: Failed, name: str):
    assert failed(name) <= exceptions()


def test_every_exception_is_needed_and_argued(failed: Failed):
    assert set().union(*(failed(name) for name in (*APPLIED, DOCKER))) == exceptions()
    argued = re.findall(r"(?:^  # .+\n)+  - (\w+)$", CONFIGURATION.read_text(), re.M)
    assert set(argued) == exceptions()


def test_checkov_would_see_root(tmp_path: Path, without_exceptions: Path):
    objects = build(K8S / "artifacts")
    job = pod_of(the(objects, "Job", "live-avatar-export"))
    job["securityContext"].update(runAsUser=0, runAsNonRoot=False)
    job["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    found = failed_checks(write(objects, tmp_path), without_exceptions) - exceptions()
    assert found == {"CKV_K8S_20", "CKV_K8S_23", "CKV_K8S_40"}
