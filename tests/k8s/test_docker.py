"""The Dockerfiles as files: what hadolint says, what they copy, and that they install what the code needs.

That the one for the CPU builds and serves is seen in test_image.py; those for GPUs were built by nobody here.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from live_avatar.serving.server_options import ServerOptions
from live_avatar.version import __version__
from tests.k8s.dockerfile import arguments_of, context, instructions, is_ignored, rules_of
from tests.k8s.manifests import K8S, ROOT, build, pod_of, server_of, workloads
from tests.k8s.programs import tool

PAGE = {".css", ".html", ".js", ".svg"}  # of the client's web server
CPU, GPU, RTX = (ROOT / "docker" / name for name in ("cpu.Dockerfile", "Dockerfile", "rtx.Dockerfile"))
EACH = pytest.mark.parametrize("path", [CPU, GPU, RTX], ids=lambda path: path.name)


def hadolint(path: Path) -> str:
    """What it has against a Dockerfile."""
    result = subprocess.run([tool("hadolint"), "--no-color", path], capture_output=True, text=True, timeout=60)
    return result.stdout + result.stderr


def required(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "docker" / "requirements.py", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def name_of(requirement: str) -> str:
    """As package indexes compare names."""
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")


@EACH
def test_hadolint_has_nothing_against_it(path: Path):
    assert hadolint(path) == ""


def test_hadolint_sees_root_and_a_base_that_moves(tmp_path: Path):
    path = tmp_path / "Dockerfile"
    path.write_text("FROM python:latest\nUSER root\n")
    said = hadolint(path)
    assert "DL3007" in said
    assert "DL3002" in said


@EACH
def test_it_runs_as_the_user_of_the_manifests(path: Path):
    [user] = arguments_of(path, "USER")
    pods = [
        pod_of(workload) for folder in ("base", "artifacts", "training") for workload in workloads(build(K8S / folder))
    ]
    contexts = [pod["securityContext"] for pod in pods]
    assert {f"{context['runAsUser']}:{context['runAsGroup']}" for context in contexts} == {user}


@EACH
def test_it_opens_the_servers_ports_and_starts_the_command(path: Path):
    options = ServerOptions(Path())
    server = server_of(build(K8S / "base"))
    [health] = [port["containerPort"] for port in server["ports"] if port["name"] == "health"]
    ports = sorted((options.http_port, options.grpc_port, options.metrics_port, health))
    assert arguments_of(path, "EXPOSE") == [" ".join(map(str, ports))]
    assert arguments_of(path, "ENTRYPOINT") == ['["live-avatar"]']


@EACH
def test_its_own_build_command_names_it_and_this_version(path: Path):
    [found] = re.findall(r"^#   docker build -f (\S+) -t \S+:(\S+) \.$", path.read_text(), re.M)
    assert found == (path.relative_to(ROOT).as_posix(), __version__)


@EACH
def test_all_that_it_copies_is_there(path: Path):
    files = {file.as_posix() for file in context(ROOT)}
    for copied in arguments_of(path, "COPY"):
        for source in copied.split()[:-1]:
            assert source == "." or source in files


def test_all_do_the_same_but_for_triton_and_tensorrt():
    def shared(path: Path) -> list[tuple[str, str]]:
        of_its_own = ("FROM", "RUN", "ARG")
        return [(found.name, found.argument) for found in instructions(path) if found.name not in of_its_own]

    assert shared(CPU) == shared(GPU) == shared(RTX)


def test_an_image_gets_code_and_nothing_else():
    files = [file for file in context(ROOT) if not (file.parts[0] == "docker" or len(file.parts) == 1)]
    assert {file.parts[0] for file in files} == {"client", "export", "live_avatar", "model_repository", "training"}
    shipped = {file for file in files if file.suffix == ".safetensors"}
    assert {file.parent.as_posix() for file in shipped} == {"live_avatar/assets/tiny"}
    code = [file for file in files if file not in shipped]
    assert {file.suffix for file in code} <= {"", ".md", ".pbtxt", ".png", ".py", ".toml", ".typed", ".wav"} | PAGE
    assert sum((ROOT / file).stat().st_size for file in code) < 4 * 2**20


@pytest.mark.parametrize(
    "path",
    [
        "live_avatar/weights.safetensors",
        "model_repository/dit_step_1/1/model.plan",
        "export/server.key",
        "client/live_avatar_client/__pycache__/base.pyc",
        "artifacts/tiny/manifest.json",
        "tests/conftest.py",
        ".git/config",
        "api.key",
    ],
)
def test_other_weights_keys_and_the_rest_of_a_checkout_stay_outside(path: str):
    assert is_ignored(path, rules_of(ROOT))


@EACH
def test_it_holds_the_modules_that_the_manifests_run(path: Path):
    """`python3 -m` finds a module of the checkout, which is not installed, from the image's working directory."""
    files = {file.as_posix() for file in context(ROOT)}
    pods = [
        pod_of(workload) for folder in ("base", "artifacts", "training") for workload in workloads(build(K8S / folder))
    ]
    containers = [container for pod in pods for container in (*pod.get("initContainers", []), *pod["containers"])]
    modules = [container["command"][2] for container in containers if container["command"][:2] == ["python3", "-m"]]
    assert modules == ["export.engines", "training.prepare"]
    assert {f"{module.replace('.', '/')}.py" for module in modules} <= files
    assert all("workingDir" not in container for container in containers)
    assert arguments_of(path, "COPY")[-1] == ". ."


def test_every_package_of_an_image_is_pinned():
    result = required()
    assert result.returncode == 0, result.stderr
    names = {name_of(line) for line in result.stdout.splitlines()}
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert names >= {name_of(line) for line in needed} - {"live-avatar-client"}
    pinned = {name_of(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert names <= pinned


def test_the_images_for_gpus_keep_their_own_triton():
    assert arguments_of(GPU, "FROM") == arguments_of(RTX, "FROM")
    assert all("--without nvidia-pytriton" in " ".join(arguments_of(path, "RUN")) for path in (GPU, RTX))
    assert "--extra tensorrt-rtx" in " ".join(arguments_of(RTX, "RUN"))
    without = required("--without", "nvidia-pytriton").stdout.splitlines()
    assert set(required().stdout.splitlines()) - set(without) == {"nvidia-pytriton==0.7.0"}


def test_the_image_for_gpus_has_the_bindings_of_its_own_tensorrt():
    assert "--extra tensorrt" in " ".join(arguments_of(GPU, "RUN"))
    added = set(required("--extra", "tensorrt").stdout.splitlines()) - set(required().stdout.splitlines())
    assert added == {"tensorrt-cu13==11.1.0.106"}
    assert "TensorRT 11.1.0.106 (as its users report)" in GPU.read_text()


def test_an_extra_that_is_not_offered_is_refused():
    result = required("--extra", "tensorflow")
    assert result.returncode == 2
    assert "--extra tensorflow: there is none; choose dev, tensorrt, tensorrt-rtx, training, web." in result.stderr


def test_a_name_that_nobody_needs_is_refused():
    result = required("--without", "tensorflow")
    assert result.returncode == 2
    assert "--without tensorflow: nothing here needs that; leave it out." in result.stderr
    assert "Traceback" not in result.stderr
