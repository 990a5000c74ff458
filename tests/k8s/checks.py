"""What must be true of the objects of k8s/: each check gives a sentence for everything that is not.

The server's own numbers and options are taken from its code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import click
import jsonschema
import kubernetes_validate

import export.engines
import live_avatar.cli.main
import training.prepare
from live_avatar.serving import gateway_process, server, supervisor
from live_avatar.serving.profiles import load_profile
from live_avatar.serving.server_options import ServerOptions
from live_avatar.version import __version__
from tests.k8s.manifests import (
    VARIABLE,
    Object,
    app_of,
    arguments,
    containers,
    environment,
    mount_of,
    named,
    of_kind,
    option,
    pod_of,
    pods,
    selects,
    server_of,
    the,
    workloads,
)

SCHEMAS = Path(__file__).parent / "schemas"
VERSIONS = ("1.31", "1.32", "1.33", "1.34", "1.35", "1.36", "1.37")
"""Of Kubernetes, whose schemas the objects are held against."""
LEAST_UID = 10_000  # below lie users of the node
GPU = "nvidia.com/gpu"
RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
COMMANDS: dict[tuple[str, ...], click.Command] = {
    ("live-avatar", "serve"): live_avatar.cli.main.serve,
    ("live-avatar", "export"): live_avatar.cli.main.export,
    ("python3", "-m", "export.engines"): export.engines.main,
    ("python3", "-m", "training.prepare"): training.prepare.main,
}
WRITTEN = {
    ("live-avatar", "export"): "output",
    ("python3", "-m", "export.engines"): "artifacts",
    ("python3", "-m", "training.prepare"): "output",
}
"""The option of a command that names a folder it writes into."""

Check = Callable[[Sequence[Object]], Iterator[str]]


# Schemas


def schema_faults(objects: Sequence[Object], version: str) -> Iterator[str]:
    """What a Kubernetes of that version would not take; a custom resource needs a schema of its own in schemas/."""
    for found in objects:
        fault = _schema_fault(json.dumps(found), version)
        if fault:
            yield f"{named(found)}, Kubernetes {version}: {fault}"


@cache  # most objects are the same in every folder, and each look-up reads a megabyte of schemas
def _schema_fault(text: str, version: str) -> str:
    found = json.loads(text)
    try:
        if _is_custom(found):
            _custom_validator(found["kind"], found["apiVersion"]).validate(found)
        else:
            kubernetes_validate.validate(found, version, strict=True)
    except jsonschema.ValidationError as error:
        return f"{error.json_path}: {error.message}"
    except (kubernetes_validate.SchemaNotFoundError, FileNotFoundError):
        return f"there is no schema for {found['apiVersion']} {found['kind']}"
    return ""


def _is_custom(found: Object) -> bool:
    """kubernetes_validate cuts `gateway.networking.k8s.io` down to `gateway`: it must not be asked about strangers."""
    group = found["apiVersion"].rpartition("/")[0]
    return "." in group and (not group.endswith(".k8s.io") or group.startswith("gateway."))


@cache
def _custom_validator(kind: str, api_version: str) -> Any:
    path = SCHEMAS / f"{kind.lower()}.{api_version.replace('/', '.')}.json"
    return jsonschema.Draft202012Validator(json.loads(path.read_text()))


# Commands


def command_faults(objects: Sequence[Object]) -> Iterator[str]:
    """Every container calls a command of this repository, with options that it knows and values that it takes."""
    for where, container in _containers(objects):
        words = arguments(objects, container)
        for name in VARIABLE.findall(" ".join(words)):
            yield f"{where}: nothing gives ${name} a value"
        command = COMMANDS.get(tuple(container.get("command", [])))
        if command is None:
            yield f"{where}: {container.get('command')} is none of {[' '.join(known) for known in COMMANDS]}"
            continue
        try:
            # click remembers a command's help option: that of the program, not its own default.
            command.make_context("command", list(words), help_option_names=["-h", "--help"])
        except click.ClickException as error:
            yield f"{where}: {error.format_message()}"


def path_faults(objects: Sequence[Object]) -> Iterator[str]:
    """Every path that a command is given lies in a volume, and in one that it may write to if it writes."""
    for where, container in _containers(objects):
        written = WRITTEN.get(tuple(container.get("command", [])))
        for word in arguments(objects, container):
            name, _, value = word.removeprefix("--").partition("=")
            if not value.startswith("/"):
                continue
            mount = mount_of(container, value)
            if mount is None:
                yield f"{where}: {word} lies in no volume"
            elif name == written and mount.get("readOnly"):
                yield f"{where}: {word} is written to, but {mount['mountPath']} is mounted read-only"


def volume_faults(objects: Sequence[Object]) -> Iterator[str]:
    """Volumes and mounts fit together, and a read-only root leaves the folders that are written to."""
    for workload in workloads(objects):
        pod = pod_of(workload)
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        mounted = {mount["name"] for container in containers(pod) for mount in container.get("volumeMounts", [])}
        for name in sorted(volumes.keys() - mounted):
            yield f"{named(workload)}: volume {name} is mounted nowhere"
        for name in sorted(mounted - volumes.keys()):
            yield f"{named(workload)}: there is no volume {name}"
    for where, container in _containers(objects):
        if mount_of(container, "/tmp") is None:
            yield f"{where}: /tmp cannot be written to"
    for deployment in of_kind(objects, "Deployment"):
        mount = mount_of(server_of(objects), "/dev/shm")
        memory = [v["name"] for v in pod_of(deployment)["volumes"] if v.get("emptyDir", {}).get("medium") == "Memory"]
        if mount is None or mount["name"] not in memory:
            yield f"{named(deployment)}: /dev/shm of the server is no volume of memory"


def version_faults(objects: Sequence[Object]) -> Iterator[str]:
    """Images and artifacts are of this version: artifacts of another one are refused when they are loaded."""
    for where, container in _containers(objects):
        if container["image"].rpartition(":")[2] != __version__:
            yield f"{where}: image {container['image']} is not of version {__version__}"
        for word in arguments(objects, container):
            if "/artifacts/s2v" in word and not word.endswith(f"-{__version__}"):
                yield f"{where}: {word} does not end with -{__version__}"


# What refers to what


def selector_faults(objects: Sequence[Object]) -> Iterator[str]:
    """What looks for pods finds those of the workload that bears the same name in its label, and no others."""
    for found, selector in _selectors(objects):
        for workload, labels in pods(objects):
            if selects(selector, labels) != (app_of(found) == app_of(workload)):
                does = "finds" if selects(selector, labels) else "does not find"
                yield f"{named(found)} {does} the pods of {named(workload)}: {selector} and {labels}"


def _selectors(objects: Sequence[Object]) -> Iterator[tuple[Object, dict[str, str]]]:
    for found in of_kind(objects, "Service"):
        yield found, found["spec"]["selector"]
    for found in of_kind(objects, "Deployment", "PodDisruptionBudget", "PodMonitor"):
        yield found, found["spec"]["selector"]["matchLabels"]
    for found in of_kind(objects, "NetworkPolicy"):
        yield found, found["spec"]["podSelector"]["matchLabels"]
    for found in of_kind(objects, "Deployment"):
        for spread in pod_of(found).get("topologySpreadConstraints", []):
            yield found, spread["labelSelector"]["matchLabels"]


def port_faults(objects: Sequence[Object]) -> Iterator[str]:
    """The server's ports are those of its options, and every port that is named by another object is one of them."""
    options = ServerOptions(Path())
    wanted = {"grpc": options.grpc_port, "http": options.http_port, "metrics": options.metrics_port}
    wanted["health"] = int(option(objects, server_of(objects), "health-port"))
    declared = {port["name"]: port["containerPort"] for port in server_of(objects)["ports"]}
    if declared != wanted:
        yield f"the server's ports are {declared}, but `live-avatar serve` opens {wanted}"
    for where, port in _ports(objects):
        if port not in declared:
            yield f"{where}: there is no port {port}, only {', '.join(declared)}"
    services = {found["metadata"]["name"]: found["spec"]["ports"] for found in of_kind(objects, "Service")}
    for where, name, port in _backends(objects):
        if not any(port in (offered["name"], offered["port"]) for offered in services.get(name, [])):
            yield f"{where}: there is no Service {name} with port {port}"


def _ports(objects: Sequence[Object]) -> Iterator[tuple[str, str]]:
    for found in of_kind(objects, "Service"):
        yield from ((named(found), port["targetPort"]) for port in found["spec"]["ports"])
    for found in of_kind(objects, "PodMonitor"):
        yield from ((named(found), endpoint["port"]) for endpoint in found["spec"]["podMetricsEndpoints"])
    for found in of_kind(objects, "NetworkPolicy"):
        yield from ((named(found), port["port"]) for rule in found["spec"].get("ingress", []) for port in rule["ports"])
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        yield name, server_of(objects)[name]["httpGet"]["port"]


def _backends(objects: Sequence[Object]) -> Iterator[tuple[str, str, str | int]]:
    """Object, Service, and port by name or number."""
    for found in of_kind(objects, "GRPCRoute"):
        for rule in found["spec"]["rules"]:
            yield from ((named(found), backend["name"], backend["port"]) for backend in rule["backendRefs"])
    for found in of_kind(objects, "Ingress"):
        for rule in found["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                service = path["backend"]["service"]
                yield named(found), service["name"], service["port"].get("name") or service["port"]["number"]


def scaling_faults(objects: Sequence[Object]) -> Iterator[str]:
    """An autoscaler has a target, whose replicas no one else sets."""
    for found in of_kind(objects, "HorizontalPodAutoscaler"):
        target = found["spec"]["scaleTargetRef"]
        known = [
            w for w in workloads(objects) if (w["kind"], w["metadata"]["name"]) == (target["kind"], target["name"])
        ]
        if not known:
            yield f"{named(found)}: there is no {target['kind']}/{target['name']}"
        for workload in known:
            if "replicas" in workload["spec"]:
                yield f"{named(workload)} sets replicas, and so does {named(found)}"


def namespace_faults(objects: Sequence[Object]) -> Iterator[str]:
    for found in objects:
        if found["kind"] != "Namespace" and found["metadata"].get("namespace") != "live-avatar":
            yield f"{named(found)} is in namespace {found['metadata'].get('namespace')}"


# The server's numbers


def time_faults(objects: Sequence[Object]) -> Iterator[str]:
    """Starting and ending, as long as the server's own limits let them take, fit what the kubelet waits."""
    deployment, container = the(objects, "Deployment"), server_of(objects)
    grace = pod_of(deployment)["terminationGracePeriodSeconds"]
    ending = (
        container["lifecycle"]["preStop"]["sleep"]["seconds"]
        + float(option(objects, container, "drain-seconds"))
        + supervisor.CLOSING_S
        + 2 * supervisor.PHASE_LIMIT_S
        + supervisor.LAST_ANSWER_S
        + supervisor.STOP_LIMIT_S
        + gateway_process.STOP_LIMIT_S
        + server.STOP_LIMIT_S
        + live_avatar.cli.main.LOG_FLUSH_S
    )
    if ending > grace:
        yield f"ending takes up to {ending:g} s, but terminationGracePeriodSeconds is {grace}"
    if triton_exit_s() > server.STOP_LIMIT_S:
        yield f"Triton may take {triton_exit_s()} s to end, and is killed after {server.STOP_LIMIT_S:g}"
    probe = container["startupProbe"]
    starting = probe["periodSeconds"] * probe["failureThreshold"]
    waiting = gateway_process.START_LIMIT_S + server.START_LIMIT_S
    if starting <= waiting:
        yield f"`serve` waits {waiting:g} s for its gateway and its models, the startup probe {starting}"
    if deployment["spec"]["progressDeadlineSeconds"] < grace + starting:
        yield f"a roll-out takes {grace + starting} s for a pod, but progressDeadlineSeconds is less"


def triton_exit_s() -> int:
    """Triton's own limit, from the line that starts it."""
    [seconds] = re.findall(r"--exit-timeout-secs=(\d+)", Path(server.__file__).read_text())
    return int(seconds)


def probe_faults(objects: Sequence[Object]) -> Iterator[str]:
    """Ready says whether sessions may come, live whether to start again; a probe's port is no port of callers."""
    container = server_of(objects)
    for name, what in (("startupProbe", "ready"), ("readinessProbe", "ready"), ("livenessProbe", "live")):
        probe = container[name]
        if probe["httpGet"]["path"] != f"/v2/health/{what}":
            yield f"{name} asks {probe['httpGet']['path']}, not /v2/health/{what}"
        if probe["httpGet"]["port"] != "health":
            yield f"{name} asks port {probe['httpGet']['port']}, which callers reach, not health"
        if probe["timeoutSeconds"] > probe["periodSeconds"]:
            yield f"{name} waits {probe['timeoutSeconds']} s, longer than its period of {probe['periodSeconds']}"


def gpu_faults(objects: Sequence[Object]) -> Iterator[str]:
    """As many GPUs as the profile's models are spread over, none for a profile of the CPU; and a node that has them."""
    deployment, container = the(objects, "Deployment"), server_of(objects)
    profile = option(objects, container, "profile")
    wanted = gpus_of(profile)
    given = int(container["resources"]["limits"].get(GPU, "0"))
    if given != wanted:
        yield f"profile {profile} runs on {wanted} GPUs, but the server has {given}"
    for init in pod_of(deployment).get("initContainers", []):
        if int(init["resources"]["limits"].get(GPU, "0")) > wanted:
            yield f"{init['name']} asks for more GPUs than the server"
    if ("affinity" in pod_of(deployment)) != (wanted > 0):
        yield f"profile {profile} runs on {wanted} GPUs, which does not fit the pod's affinity"


def gpus_of(profile: str) -> int:
    """The GPUs that a profile's models are spread over."""
    return len(load_profile(profile).gpus)


def resource_faults(objects: Sequence[Object]) -> Iterator[str]:
    """Every container gets what it asks for, and no more: the pod is of the class Guaranteed."""
    for where, container in _containers(objects):
        resources = container.get("resources", {})
        if resources.get("requests") != resources.get("limits") or not {"cpu", "memory"} <= {
            *resources.get("limits", {})
        }:
            yield f"{where}: requests and limits of CPU and memory are not the same: {resources}"
    for workload in workloads(objects):
        for volume in pod_of(workload).get("volumes", []):
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                yield f"{named(workload)}: volume {volume['name']} may fill the node"


def security_faults(objects: Sequence[Object]) -> Iterator[str]:
    """No root, no privileges, no token, a root file system that nobody writes to."""
    for workload in workloads(objects):
        pod = pod_of(workload)
        context = pod.get("securityContext", {})
        if not context.get("runAsNonRoot") or context.get("runAsUser", 0) < LEAST_UID:
            yield f"{named(workload)} does not run as a user of its own, from {LEAST_UID} up"
        if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{named(workload)} has no seccomp profile"
        if pod.get("automountServiceAccountToken") is not False:
            yield f"{named(workload)} is given a token of its service account"
        for key in ("hostNetwork", "hostPID", "hostIPC"):
            if pod.get(key):
                yield f"{named(workload)} has {key}"
    for where, container in _containers(objects):
        if container.get("securityContext") != RESTRICTED:
            yield f"{where}: its securityContext is {container.get('securityContext')}, not {RESTRICTED}"


def environment_faults(objects: Sequence[Object]) -> Iterator[str]:
    """No key is in a ConfigMap, or in an environment: files alone, so that no log and no child shows it."""
    for where, container in _containers(objects):
        if "env" in container:
            yield f"{where}: has `env`; put settings into the ConfigMap, and keys into files"
        for name in environment(objects, container):
            if re.search("KEY|TOKEN|SECRET|PASSWORD", name):
                yield f"{where}: {name} looks like a secret"


def _containers(objects: Sequence[Object]) -> Iterator[tuple[str, Object]]:
    for workload in workloads(objects):
        for container in containers(pod_of(workload)):
            yield f"{named(workload)}, {container['name']}", container


ANY: tuple[Check, ...] = (
    command_faults,
    path_faults,
    volume_faults,
    selector_faults,
    scaling_faults,
    namespace_faults,
    resource_faults,
    security_faults,
    environment_faults,
)
"""Of every kustomization."""
SERVER: tuple[Check, ...] = (port_faults, time_faults, probe_faults, gpu_faults)
"""Of those with the server in them."""
PLACES: tuple[Check, ...] = (version_faults,)
"""Of what is applied to a cluster, where the base's names of images have become those of a registry."""
