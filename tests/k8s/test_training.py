"""The training job of k8s/training: Kubeflow's controller makes of it a Job that Kubernetes and the code take."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import click
import pytest

from tests.k8s.checks import VERSIONS, resource_faults, schema_faults, version_faults, volume_faults
from tests.k8s.manifests import K8S, Object, build, the
from training import run
from training.config import AdapterConfig, load
from training.distributed import OWN_STORE

NAME = "live-avatar-training"


@cache
def objects() -> list[Object]:
    return build(K8S / "training" / "stages")


def node() -> Object:
    """The Job of the nodes, with the command of the TrainJob, as the controller makes it."""
    [replicated] = the(objects(), "TrainingRuntime", NAME)["spec"]["template"]["spec"]["replicatedJobs"]
    trainer = the(objects(), "TrainJob", NAME)["spec"]["trainer"]
    assert replicated["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    pod = replicated["template"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    filled = {**container, "command": trainer["command"], "args": trainer["args"]}
    spec = {
        **replicated["template"]["spec"],
        "template": {**replicated["template"]["spec"]["template"], "spec": {**pod, "containers": [filled]}},
    }
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": NAME}, "spec": spec}


def words() -> list[str]:
    return list(the(objects(), "TrainJob", NAME)["spec"]["trainer"]["args"])


@pytest.mark.parametrize("version", VERSIONS)
def test_the_nodes_are_a_job_that_kubernetes_takes(version: str) -> None:
    assert list(schema_faults([node()], version)) == []


def test_its_volumes_resources_and_version_fit() -> None:
    faults = [fault for check in (volume_faults, resource_faults, version_faults) for fault in check([node()])]
    assert faults == []


def test_torchrun_gets_the_rendezvous_of_kubeflow_and_the_command_its_options() -> None:
    given = words()
    launch, command = given[: given.index("-m")], given[given.index("-m") + 1 :]
    assert "--rdzv-backend=c10d" in launch
    assert "--rdzv-endpoint=$(PET_MASTER_ADDR):$(PET_MASTER_PORT)" in launch
    assert "--nnodes=$(PET_NNODES)" in launch
    [container] = node()["spec"]["template"]["spec"]["containers"]
    assert {"name": OWN_STORE, "value": "1"} in container["env"]
    assert command[0] == "training.run"
    context = run.main.make_context("command", command[1:])
    assert isinstance(context, click.Context)
    assert context.params["stage"] == run.ALL


def test_gpus_processes_and_clips_are_those_of_the_configuration() -> None:
    [option] = [word for word in words() if word.startswith("--config=")]
    config = load(run.ROOT / Path(option.partition("=")[2]).relative_to("/opt/live-avatar"))
    assert isinstance(config, AdapterConfig)
    trainer = the(objects(), "TrainJob", NAME)["spec"]["trainer"]
    runtime = the(objects(), "TrainingRuntime", NAME)["spec"]
    [container] = node()["spec"]["template"]["spec"]["containers"]
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert gpus == trainer["numProcPerNode"] == config.shard_ranks
    assert f"--nproc-per-node={gpus}" in words()
    assert trainer["numNodes"] == runtime["mlPolicy"]["numNodes"]
    assert trainer["numNodes"] * gpus == config.stage1.batch == config.stage2.batch
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {f"{container['workingDir']}/{name}" for name in (config.checkpoint, config.data.shards)} <= mounted
