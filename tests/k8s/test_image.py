"""docker/cpu.Dockerfile is built, and runs as the pod of overlays/cpu-kind, without Docker and without a cluster.

The user, rights, read-only root, volumes, arguments, settings and probes are those of the manifests; it has a network
of its own, and the server is process 1, as in a container. Not here: the base image (this machine's Python and
libraries stand in), seccomp, limits of CPU and memory, and the kubelet, whose part the tests play.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from live_avatar.assets import PORTRAIT, SPEECH
from live_avatar.gateway.keys import add_key
from tests.cli.support import COMMANDS, wait_until
from tests.k8s.dockerfile import Image
from tests.k8s.dockerfile import build as build_image
from tests.k8s.manifests import K8S, ROOT, Object, arguments, build, environment, pod_of, quantity, server_of, the
from tests.k8s.sandbox import Container, ContainerError, Mount, Running, run, started

pytestmark = pytest.mark.k8s

PROBE = """
import sys, urllib.request
urllib.request.build_opener(urllib.request.ProxyHandler({})).open(sys.argv[1], timeout=float(sys.argv[2]))
"""
GRPC_HEALTH = """
import grpc
with grpc.insecure_channel("127.0.0.1:8001") as channel:
    print(channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=10.0))
"""
SERVING = b"\x08\x01"  # field 1 of HealthCheckResponse
CALLER = "trial"
LIMIT_S = 300.0


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """Built with the packages of the indexes that this machine's pip knows, not of PyTorch's own."""
    opt = tmp_path_factory.mktemp("opt")
    opt.chmod(0o755)
    indexes = {name: os.environ.get(name) for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL")}
    return build_image(ROOT / "docker" / "cpu.Dockerfile", opt, indexes)


@pytest.fixture(scope="module")
def objects() -> list[Object]:
    return build(K8S / "overlays" / "cpu-kind")


@dataclass
class Pod:
    """`key` is the API key's file on this machine."""

    server: Object
    running: Running
    log: Path
    key: Path

    def answers(self, probe: str) -> bool:
        """Asks as the kubelet does."""
        asked = self.server[probe]
        [port] = [port["containerPort"] for port in self.server["ports"] if port["name"] == asked["httpGet"]["port"]]
        url = f"http://127.0.0.1:{port}{asked['httpGet']['path']}"
        return self.python("-c", PROBE, url, asked["timeoutSeconds"]).returncode == 0

    def command(self, *words: object) -> subprocess.CompletedProcess[str]:
        """`live-avatar` of this checkout as a client in the pod's network."""
        return self.python("-m", "live_avatar.cli", *words)

    def speak(self, output: Path, *options: object) -> subprocess.CompletedProcess[str]:
        """Six seconds of speech."""
        files = ("--audio", SPEECH, "--image", PORTRAIT, "--output", output, "--api-key-file", self.key)
        return self.command("stream", "--url", "127.0.0.1:8001", *files, *options)

    def python(self, *words: object) -> subprocess.CompletedProcess[str]:
        command = self.running.entered([sys.executable, *map(str, words)])
        return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)


@pytest.fixture(scope="module")
def pod(image: Image, objects: list[Object], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    """Init containers have run, and the startup probe has been answered."""
    folder = tmp_path_factory.mktemp("pod")
    spec = pod_of(the(objects, "Deployment"))
    volumes = make_volumes(spec, folder)
    for init in spec["initContainers"]:
        run(container_of(objects, spec, init, image, volumes), LIMIT_S)
    server, log = server_of(objects), folder / "server.log"
    with started(container_of(objects, spec, server, image, volumes), log) as running:
        found = Pod(server, running, log, folder / "api.key")
        wait_until(lambda: running.wrapper.poll() is not None or found.answers("startupProbe"))
        assert running.wrapper.poll() is None, log.read_text()
        yield found


def make_volumes(spec: Object, folder: Path) -> dict[str, Mount]:
    """The pod's volumes, as the kubelet makes them: owned by root, and for the group that they are mounted for."""
    group = spec["securityContext"]["fsGroup"]
    volumes = {}
    for volume in spec["volumes"]:
        if volume.get("emptyDir", {}).get("medium") == "Memory":
            volumes[volume["name"]] = Mount("", None, bytes=round(quantity(volume["emptyDir"]["sizeLimit"])))
            continue
        place = folder / volume["name"]
        place.mkdir()
        if "secret" in volume:
            keys = place / "api-keys"
            (folder / "api.key").write_text(add_key(keys, CALLER))
            keys.chmod(volume["secret"]["defaultMode"])
            os.chown(keys, 0, group)
        os.chown(place, 0, group)
        place.chmod(0o2775)
        volumes[volume["name"]] = Mount("", place)
    return volumes


def container_of(
    objects: Sequence[Object], spec: Object, container: Object, image: Image, volumes: Mapping[str, Mount]
) -> Container:
    mounts = [
        replace(volumes[mount["name"]], path=mount["mountPath"], is_read_only=mount.get("readOnly", False))
        for mount in container["volumeMounts"]
    ]
    return Container(
        command=[*container.get("command", image.entrypoint), *arguments(objects, container)],
        environment=image.environment | environment(objects, container),
        folder=image.folder,
        opt=image.opt,
        mounts=mounts,
        user=spec["securityContext"]["runAsUser"],
        group=spec["securityContext"]["runAsGroup"],
    )


def said(result: subprocess.CompletedProcess[str]) -> str:
    """All that a command wrote, for an assertion that fails."""
    return result.stdout + result.stderr


def test_the_entrypoint_shows_the_commands(image: Image) -> None:
    user, group = map(int, image.user.split(":"))
    container = Container([*image.entrypoint, "--help"], image.environment, image.folder, image.opt)
    shown = run(replace(container, user=user, group=group, mounts=[Mount("/tmp", None, bytes=2**20)]), LIMIT_S)
    assert "Usage: live-avatar" in shown
    assert [name for name in COMMANDS if f"\n  {name} " not in shown] == []


def test_nothing_but_its_volumes_can_be_written(image: Image, objects: list[Object], tmp_path: Path) -> None:
    spec = pod_of(the(objects, "Deployment"))
    container = container_of(objects, spec, server_of(objects), image, make_volumes(spec, tmp_path))

    def shell(line: str) -> str:
        return run(replace(container, command=["/bin/sh", "-c", line]), LIMIT_S)

    assert shell("id -u; grep CapEff /proc/self/status; touch /tmp/x /dev/shm/x").split() == [
        str(spec["securityContext"]["runAsUser"]),
        "CapEff:",
        "0" * 16,
    ]
    for place in ("/", "/opt/live-avatar", "/artifacts", "/keys", "/usr"):
        with pytest.raises(ContainerError) as refused:
            shell(f"touch {place}/x")
        assert "Read-only file system" in refused.value.output or "Permission denied" in refused.value.output


def test_every_probe_is_answered(pod: Pod) -> None:
    assert {name: pod.answers(name) for name in ("startupProbe", "readinessProbe", "livenessProbe")} == {
        "startupProbe": True,
        "readinessProbe": True,
        "livenessProbe": True,
    }


def test_grpcs_own_health_needs_no_key(pod: Pod) -> None:
    asked = pod.python("-c", GRPC_HEALTH)
    assert asked.stdout.strip() == str(SERVING), said(asked)


def test_a_session_needs_the_key_of_the_secret(pod: Pod, tmp_path: Path) -> None:
    refused = pod.command("doctor", "127.0.0.1:8001")
    assert refused.returncode == 1, said(refused)
    found = pod.command("doctor", "127.0.0.1:8001", "--api-key-file", pod.key)
    assert found.returncode == 0, said(found)
    spoken = pod.speak(tmp_path / "video.mp4")
    assert spoken.returncode == 0, said(spoken)
    assert (tmp_path / "video.mp4").stat().st_size > 10_000


def test_process_1_drains_and_ends(pod: Pod, tmp_path: Path) -> None:
    """The last one. While it drains it is alive and not ready, and the live session gets all its frames."""
    with ThreadPoolExecutor(1) as threads:
        speaking = threads.submit(pod.speak, tmp_path / "video.mp4", "--pace", "realtime")
        wait_until(lambda: speaking.done() or pod.log.read_text().count(f" started: key={CALLER} ") == 2)
        os.kill(pod.running.process, signal.SIGTERM)
        wait_until(lambda: not pod.answers("readinessProbe"))
        assert not speaking.done(), said(speaking.result())
        assert pod.answers("livenessProbe")
        assert speaking.result().returncode == 0, said(speaking.result())
    assert pod.running.wrapper.wait(LIMIT_S) == 0, pod.log.read_text()
    ended = [line for line in pod.log.read_text().splitlines() if f" ended: key={CALLER} " in line]
    assert [" cause=completed " in line for line in ended] == [True, True]
