"""The checks of checks.py notice: each is shown objects with one thing broken, and must say it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.k8s import checks
from tests.k8s.checks import Check, schema_faults
from tests.k8s.manifests import K8S, Object, build, combined, of_kind, pod_of, server_of, the

Breaks = Callable[[list[Object]], Any]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], list[Object]]:
    """Every kind of object that there is, all right; a copy to break at each call."""
    resources = [K8S / "overlays" / "h800", K8S / "artifacts", K8S / "examples"]
    objects = combined(tmp_path_factory.mktemp("good"), resources, [])
    return lambda: copy.deepcopy(objects)


@cache
def spec(kind: str, name: str = "live-avatar") -> Callable[[list[Object]], Object]:
    return lambda objects: the(objects, kind, name)["spec"]


def pod(objects: list[Object]) -> Object:
    return pod_of(the(objects, "Deployment"))


def engines(objects: list[Object]) -> Object:
    [found] = pod(objects)["initContainers"]
    return found


def job(objects: list[Object]) -> Object:
    return pod_of(the(objects, "Job", "live-avatar-export"))


def settings(objects: list[Object]) -> Object:
    [found] = [c for c in of_kind(objects, "ConfigMap") if "PROFILE" in c["data"]]
    return found["data"]


def replace_argument(container: Object, name: str, value: str) -> None:
    container["args"] = [value if word.startswith(name) else word for word in container["args"]]


SCHEMA: dict[str, tuple[Breaks, str]] = {
    "a field that Kubernetes does not know": (
        lambda o: server_of(o).update(liveness={}),
        "Deployment/live-avatar, Kubernetes 1.31: $.spec.template.spec.containers[0]",
    ),
    "a number in the place of a text": (
        lambda o: settings(o).update(MAX_SESSIONS=1),
        "Kubernetes 1.31: $.data.MAX_SESSIONS: 1 is not of type 'string'",
    ),
    "an API that was removed": (
        lambda o: the(o, "HorizontalPodAutoscaler").update(apiVersion="autoscaling/v2beta2"),
        "HorizontalPodAutoscaler/live-avatar, Kubernetes 1.31: there is no schema for autoscaling/v2beta2",
    ),
    "a custom resource that nobody described": (
        lambda o: the(o, "PodMonitor").update(kind="Probe"),
        "Probe/live-avatar, Kubernetes 1.31: there is no schema for monitoring.coreos.com/v1 Probe",
    ),
    "a stranger's API whose name begins like one of Kubernetes": (
        lambda o: the(o, "Ingress").update(apiVersion="networking.example.com/v1"),
        "Ingress/live-avatar, Kubernetes 1.31: there is no schema for networking.example.com/v1",
    ),
    "a custom resource with a wrong field": (
        lambda o: spec("PodMonitor")(o).update(podMetricsEndpoint=[]),
        "PodMonitor/live-avatar, Kubernetes 1.31: $.spec: Additional properties are not allowed",
    ),
    "a route without its method": (
        lambda o: spec("GRPCRoute")(o)["rules"][0]["matches"][0].update(method={}),
        "GRPCRoute/live-avatar, Kubernetes 1.31: $.spec.rules[0].matches[0].method",
    ),
    "an alert without an expression": (
        lambda o: spec("PrometheusRule")(o)["groups"][0].update(rules=[{"alert": "Nothing"}]),
        "PrometheusRule/live-avatar, Kubernetes 1.31: $.spec.groups[0].rules[0]",
    ),
    "a certificate of an unknown kind of key": (
        lambda o: spec("Certificate")(o)["privateKey"].update(algorithm="DSA"),
        "Certificate/live-avatar, Kubernetes 1.31: $.spec.privateKey.algorithm: 'DSA' is not one of",
    ),
}
BROKEN: dict[str, tuple[Check, Breaks, str]] = {
    "an option that the server does not know": (
        checks.command_faults,
        lambda o: server_of(o)["args"].append("--max-streams=2"),
        "server: No such option '--max-streams'",
    ),
    "a value that the server does not take": (
        checks.command_faults,
        lambda o: settings(o).update(DRAIN_SECONDS="-1"),
        "server: Invalid value for '--drain-seconds'",
    ),
    "an option that an init container does not know": (
        checks.command_faults,
        lambda o: engines(o)["args"].append("--profile=gpux5"),
        "engines: No such option '--profile'",
    ),
    "an option that the export does not know": (
        checks.command_faults,
        lambda o: job(o)["containers"][0]["args"].append("--steps=many"),
        "export: Invalid value for '--steps'",
    ),
    "a required option left out": (
        checks.command_faults,
        lambda o: replace_argument(server_of(o), "--artifacts", "--verbose"),
        "server: Missing option '--artifacts'",
    ),
    "a variable without a value": (
        checks.command_faults,
        lambda o: settings(o).pop("PROFILE"),
        "server: nothing gives $PROFILE a value",
    ),
    "a command of somebody else": (
        checks.command_faults,
        lambda o: server_of(o).update(command=["tritonserver"]),
        "server: ['tritonserver'] is none of",
    ),
    "a key outside every volume": (
        checks.path_faults,
        lambda o: replace_argument(server_of(o), "--api-key-file", "--api-key-file=/secrets/key"),
        "server: --api-key-file=/secrets/key lies in no volume",
    ),
    "engines on a read-only volume": (
        checks.path_faults,
        lambda o: engines(o)["volumeMounts"][0].update(readOnly=True),
        "is written to, but /artifacts is mounted read-only",
    ),
    "a mount without a volume": (
        checks.volume_faults,
        lambda o: pod(o)["volumes"].pop(0),
        "there is no volume artifacts",
    ),
    "a volume without a mount": (
        checks.volume_faults,
        lambda o: pod(o)["volumes"].append({"name": "huge", "emptyDir": {}}),
        "volume huge is mounted nowhere",
    ),
    "no place for temporary files": (
        checks.volume_faults,
        lambda o: engines(o)["volumeMounts"].pop(),
        "engines: /tmp cannot be written to",
    ),
    "the kubelet's own /dev/shm": (
        checks.volume_faults,
        lambda o: server_of(o)["volumeMounts"].pop(3),
        "/dev/shm of the server is no volume of memory",
    ),
    "another version's image": (
        checks.version_faults,
        lambda o: server_of(o).update(image="live-avatar:latest"),
        "server: image live-avatar:latest is not of version",
    ),
    "another version's artifacts": (
        checks.version_faults,
        lambda o: settings(o).update(ARTIFACTS="/artifacts/s2v-14b-0.0.9"),
        "server: --artifacts=/artifacts/s2v-14b-0.0.9 does not end with -",
    ),
    "a Service that finds nothing": (
        checks.selector_faults,
        lambda o: spec("Service")(o).update(selector={"app": "live-avatar"}),
        "Service/live-avatar does not find the pods of Deployment/live-avatar",
    ),
    "a Service that finds the export": (
        checks.selector_faults,
        lambda o: the(o, "Job", "live-avatar-export")["spec"]["template"]["metadata"].update(
            labels={"app.kubernetes.io/name": "live-avatar"}
        ),
        "Service/live-avatar finds the pods of Job/live-avatar-export",
    ),
    "a policy for other pods": (
        checks.selector_faults,
        lambda o: spec("NetworkPolicy")(o).update(podSelector={"matchLabels": {"role": "avatar"}}),
        "NetworkPolicy/live-avatar does not find the pods of Deployment/live-avatar",
    ),
    "a port that the server does not open": (
        checks.port_faults,
        lambda o: server_of(o)["ports"][0].update(containerPort=9001),
        "the server's ports are {'grpc': 9001",
    ),
    "metrics on a port that is not there": (
        checks.port_faults,
        lambda o: spec("PodMonitor")(o)["podMetricsEndpoints"][0].update(port="prometheus"),
        "PodMonitor/live-avatar: there is no port prometheus, only grpc, http, metrics, health",
    ),
    "a route to nowhere": (
        checks.port_faults,
        lambda o: spec("GRPCRoute")(o)["rules"][0]["backendRefs"][0].update(port=8000),
        "GRPCRoute/live-avatar: there is no Service live-avatar with port 8000",
    ),
    "an ingress to nowhere": (
        checks.port_faults,
        lambda o: spec("Service")(o)["ports"][0].update(name="h2c"),
        "Ingress/live-avatar: there is no Service live-avatar with port grpc",
    ),
    "an autoscaler without a target": (
        checks.scaling_faults,
        lambda o: spec("HorizontalPodAutoscaler")(o)["scaleTargetRef"].update(kind="StatefulSet"),
        "there is no StatefulSet/live-avatar",
    ),
    "two that set the replicas": (
        checks.scaling_faults,
        lambda o: spec("Deployment")(o).update(replicas=2),
        "Deployment/live-avatar sets replicas, and so does HorizontalPodAutoscaler/live-avatar",
    ),
    "an object in another namespace": (
        checks.namespace_faults,
        lambda o: the(o, "PodDisruptionBudget")["metadata"].update(namespace="default"),
        "PodDisruptionBudget/live-avatar is in namespace default",
    ),
    "a drain that the kubelet cuts short": (
        checks.time_faults,
        lambda o: settings(o).update(DRAIN_SECONDS="600"),
        "ending takes up to 632.3 s, but terminationGracePeriodSeconds is 600",
    ),
    "a start that the kubelet cuts short": (
        checks.time_faults,
        lambda o: server_of(o)["startupProbe"].update(failureThreshold=30),
        "`serve` waits 1860 s for its gateway and its models, the startup probe 300",
    ),
    "a roll-out that is given up too soon": (
        checks.time_faults,
        lambda o: spec("Deployment")(o).update(progressDeadlineSeconds=600),
        "a roll-out takes 2500 s for a pod",
    ),
    "a probe of the wrong question": (
        checks.probe_faults,
        lambda o: server_of(o)["livenessProbe"]["httpGet"].update(path="/v2/health/ready"),
        "livenessProbe asks /v2/health/ready, not /v2/health/live",
    ),
    "a probe on a port of the callers": (
        checks.probe_faults,
        lambda o: server_of(o)["readinessProbe"]["httpGet"].update(port="http"),
        "readinessProbe asks port http, which callers reach, not health",
    ),
    "a health port that the server does not open": (
        checks.port_faults,
        lambda o: replace_argument(server_of(o), "--health-port", "--health-port=8004"),
        "but `live-avatar serve` opens {'grpc': 8001, 'http': 8000, 'metrics': 8002, 'health': 8004}",
    ),
    "a probe that runs into the next": (
        checks.probe_faults,
        lambda o: server_of(o)["readinessProbe"].update(timeoutSeconds=30),
        "readinessProbe waits 30 s, longer than its period of 5",
    ),
    "a GPU too few": (
        checks.gpu_faults,
        lambda o: settings(o).update(PROFILE="gpux4"),
        "profile gpux4 runs on 4 GPUs, but the server has 5",
    ),
    "a profile of the CPU on a node of GPUs": (
        checks.gpu_faults,
        lambda o: (settings(o).update(PROFILE="cpu"), server_of(o)["resources"]["limits"].pop(checks.GPU)),
        "profile cpu runs on 0 GPUs, which does not fit the pod's affinity",
    ),
    "memory that may be taken away": (
        checks.resource_faults,
        lambda o: server_of(o)["resources"]["requests"].update(memory="1Gi"),
        "server: requests and limits of CPU and memory are not the same",
    ),
    "a volume without an end": (
        checks.resource_faults,
        lambda o: job(o)["volumes"][2]["emptyDir"].pop("sizeLimit"),
        "Job/live-avatar-export: volume scratch may fill the node",
    ),
    "root": (
        checks.security_faults,
        lambda o: pod(o)["securityContext"].update(runAsUser=0),
        "Deployment/live-avatar does not run as a user of its own",
    ),
    "no seccomp profile": (
        checks.security_faults,
        lambda o: job(o)["securityContext"].pop("seccompProfile"),
        "Job/live-avatar-export has no seccomp profile",
    ),
    "a token": (
        checks.security_faults,
        lambda o: pod(o).pop("automountServiceAccountToken"),
        "Deployment/live-avatar is given a token of its service account",
    ),
    "the node's network": (
        checks.security_faults,
        lambda o: pod(o).update(hostNetwork=True),
        "Deployment/live-avatar has hostNetwork",
    ),
    "a root file system that can be written to": (
        checks.security_faults,
        lambda o: engines(o)["securityContext"].update(readOnlyRootFilesystem=False),
        "engines: its securityContext is",
    ),
    "a key in the environment": (
        checks.environment_faults,
        lambda o: settings(o).update(API_KEY="abc"),
        "server: API_KEY looks like a secret",
    ),
    "settings past the ConfigMap": (
        checks.environment_faults,
        lambda o: server_of(o).update(env=[{"name": "DEBUG", "value": "1"}]),
        "server: has `env`",
    ),
}


def test_nothing_is_wrong_before(good: Callable[[], list[Object]]):
    assert [*schema_faults(good(), "1.31"), *schema_faults(good(), "1.37")] == []
    for check in (*checks.ANY, *checks.SERVER, *checks.PLACES):
        assert list(check(good())) == []


@pytest.mark.parametrize("what", SCHEMA)
def test_a_schema_refuses(good: Callable[[], list[Object]], what: str):
    breaks, sentence = SCHEMA[what]
    objects = good()
    breaks(objects)
    faults = list(schema_faults(objects, "1.31"))
    assert len(faults) == 1
    assert sentence in faults[0]


@pytest.mark.parametrize("what", BROKEN)
def test_a_check_says_what_is_broken(good: Callable[[], list[Object]], what: str):
    check, breaks, sentence = BROKEN[what]
    objects = good()
    breaks(objects)
    assert any(sentence in fault for fault in check(objects)), list(check(objects))


def test_every_check_is_shown_something_broken():
    assert {check for check, _, _ in BROKEN.values()} == {*checks.ANY, *checks.SERVER, *checks.PLACES}


def test_a_kustomization_of_a_file_that_is_not_there_is_not_built(tmp_path: Path):
    (tmp_path / "kustomization.yaml").write_text("resources: [missing.yaml]\n")
    with pytest.raises(AssertionError, match=r"missing\.yaml"):
        build(tmp_path)
