"""What kustomize makes of k8s/, as plain objects, and how to find one's way in them."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.k8s.programs import ROOT, tool

K8S = ROOT / "k8s"
APPLIED = ("artifacts", "training", "overlays/cpu-kind", "overlays/h800", "overlays/rtx")
"""Folders that are applied to a cluster as they are."""
VARIABLE = re.compile(r"\$\((\w+)\)")

Object = dict[str, Any]


def build(folder: Path) -> list[Object]:
    """The objects of a kustomization. Fails with kubectl's words."""
    result = subprocess.run([tool("kubectl"), "kustomize", folder], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stderr == "", result.stderr  # a warning
    return [found for found in yaml.load_all(result.stdout, yaml.CSafeLoader) if found]


def combined(folder: Path, resources: Sequence[Path], components: Sequence[Path]) -> list[Object]:
    """The objects of bases and components together, by a kustomization that is written into `folder`."""
    kustomization = {
        "namespace": "live-avatar",
        "resources": [os.path.relpath(path, folder) for path in resources],
        "components": [os.path.relpath(path, folder) for path in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return build(folder)


def of_kind(objects: Sequence[Object], *kinds: str) -> list[Object]:
    return [found for found in objects if found["kind"] in kinds]


def named(found: Object) -> str:
    return f"{found['kind']}/{found['metadata']['name']}"


def app_of(found: Object) -> str:
    """The application that an object belongs to, by its own label."""
    name: str = found["metadata"]["labels"]["app.kubernetes.io/name"]
    return name


def the(objects: Sequence[Object], kind: str, name: str = "live-avatar") -> Object:
    [found] = [found for found in of_kind(objects, kind) if found["metadata"]["name"] == name]
    return found


def workloads(objects: Sequence[Object]) -> list[Object]:
    return of_kind(objects, "Deployment", "Job")


def pod_of(workload: Object) -> Object:
    """The pod's spec."""
    spec: Object = workload["spec"]["template"]["spec"]
    return spec


def containers(pod: Object) -> list[Object]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def server_of(objects: Sequence[Object]) -> Object:
    [server] = pod_of(the(objects, "Deployment"))["containers"]
    found: Object = server
    return found


def environment(objects: Sequence[Object], container: Object) -> dict[str, str]:
    """What a container finds in its environment, of the ConfigMaps among the objects."""
    values: dict[str, str] = {}
    for source in container.get("envFrom", []):
        name = source["configMapRef"]["name"]
        [data] = [found["data"] for found in of_kind(objects, "ConfigMap") if found["metadata"]["name"] == name]
        values |= data
    return values


def arguments(objects: Sequence[Object], container: Object) -> list[str]:
    """The arguments with values in place of $(NAME); as Kubernetes does, a name that nobody knows stays as it is."""
    values = environment(objects, container)
    return [VARIABLE.sub(lambda match: values.get(match[1], match[0]), word) for word in container.get("args", [])]


def option(objects: Sequence[Object], container: Object, name: str) -> str:
    """The value of an option that is written --name=value."""
    [value] = [
        word.partition("=")[2] for word in arguments(objects, container) if word.partition("=")[0] == f"--{name}"
    ]
    return value


def mount_of(container: Object, path: str) -> Object | None:
    """The mount that a path of the container lies in: the innermost."""
    around = [
        mount
        for mount in container.get("volumeMounts", [])
        if path == mount["mountPath"] or path.startswith(f"{mount['mountPath']}/")
    ]
    return max(around, key=lambda mount: len(mount["mountPath"]), default=None)


def quantity(text: str) -> float:
    """A number of Kubernetes' notation, of bytes, cores or things."""
    match = re.fullmatch(r"([\d.]+)(Ki|Mi|Gi|Ti|m|k|M|G|T)?", text)
    assert match is not None, text
    factors: Mapping[str | None, float] = {
        None: 1,
        "m": 1e-3,
        "k": 1e3,
        "M": 1e6,
        "G": 1e9,
        "T": 1e12,
        "Ki": 2**10,
        "Mi": 2**20,
        "Gi": 2**30,
        "Ti": 2**40,
    }
    return float(match[1]) * factors[match[2]]


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    return all(labels.get(name) == value for name, value in selector.items())


def pods(objects: Sequence[Object]) -> Iterator[tuple[Object, dict[str, str]]]:
    """Every workload with the labels of its pods."""
    for workload in workloads(objects):
        yield workload, workload["spec"]["template"]["metadata"].get("labels", {})
