"""Everything in k8s/ builds, is what Kubernetes takes, and fits the code that it runs."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import kubernetes_validate.utils
import pytest
import yaml

import training.prepare
from live_avatar.config import S2V_14B
from live_avatar.gateway.pictures import AT_ONCE
from live_avatar.gateway.sandbox import MIB, Limits
from live_avatar.graphs.memory import GIB, WORKSPACE_BYTES, decoder_memory, denoiser_memory, fitting_sessions
from live_avatar.pipeline.denoiser import one_step
from live_avatar.serving.profiles import load_profile
from live_avatar.version import __version__
from live_avatar_client.protocol import FRAMES_PER_BLOCK
from tests.k8s.checks import ANY, PLACES, SERVER, VERSIONS, Check, gpus_of, schema_faults
from tests.k8s.manifests import (
    APPLIED,
    K8S,
    ROOT,
    Object,
    build,
    combined,
    containers,
    environment,
    named,
    of_kind,
    option,
    pod_of,
    quantity,
    server_of,
    the,
)

FOLDERS = tuple(sorted(path.parent.relative_to(K8S).as_posix() for path in K8S.glob("**/kustomization.yaml")))
BUILT = tuple(folder for folder in FOLDERS if not folder.startswith("components/"))
COMPONENTS = tuple(folder for folder in FOLDERS if folder.startswith("components/"))
CPU_PROCESSES_BYTES = 1.4 * GIB
"""Memory of Triton, the stages and `serve` with the tiny preset, measured."""
NEEDS = {"components/mtls": ("components/tls",), "components/autoscaling": ("components/monitoring",)}
"""Components that stand on others."""
WITH_SERVER = ("base", "overlays/cpu-kind", "overlays/h800", "overlays/rtx", *COMPONENTS)
SHM_GROWTH = 1.6
"""A region of shared memory over the bytes of its largest request: 46 MiB for 29.3 were measured, 16 for 11.4."""


@pytest.fixture(scope="session")
def objects_of(tmp_path_factory: pytest.TempPathFactory) -> object:
    """The objects of a folder of k8s/; of a component, those of the base with it."""

    @cache
    def objects_of(folder: str) -> list[Object]:
        if folder not in COMPONENTS:
            return build(K8S / folder)
        components = [K8S / name for name in (*NEEDS.get(folder, ()), folder)]
        return combined(tmp_path_factory.mktemp("kustomization"), [K8S / "base"], components)

    return objects_of


def every(check: Check) -> str:
    return check.__name__


def test_every_folder_is_looked_at():
    overlays = {f"overlays/{name}" for name in ("h800", "rtx", "cpu-kind")}
    assert {*overlays, "artifacts", "examples", "namespace", "base", "training"} <= set(BUILT)
    sized = ("cpu-only", "rtx", "one-gpu", "two-gpu", "four-gpu")
    assert {f"components/{name}" for name in ("tls", "mtls", "network-policy", *sized)} <= set(COMPONENTS)


def test_the_schemas_are_of_the_versions_that_we_say():
    known = {kubernetes_validate.utils.major_minor(version) for version in kubernetes_validate.utils.all_versions()}
    assert set(VERSIONS) <= known
    assert max(known, key=lambda version: int(version.partition(".")[2])) == VERSIONS[-1], "a newer one can be added"


@pytest.mark.parametrize("folder", FOLDERS)
def test_kubernetes_takes_every_object(objects_of, folder: str):
    objects = objects_of(folder)
    assert objects
    assert [fault for version in VERSIONS for fault in schema_faults(objects, version)] == []


@pytest.mark.parametrize("check", ANY, ids=every)
@pytest.mark.parametrize("folder", FOLDERS)
def test_the_objects_fit_the_code_and_one_another(objects_of, folder: str, check: Check):
    assert list(check(objects_of(folder))) == []


@pytest.mark.parametrize("check", SERVER, ids=every)
@pytest.mark.parametrize("folder", WITH_SERVER)
def test_the_server_gets_what_its_code_says(objects_of, folder: str, check: Check):
    assert list(check(objects_of(folder))) == []


@pytest.mark.parametrize("check", PLACES, ids=every)
@pytest.mark.parametrize("folder", APPLIED)
def test_what_is_applied_is_of_this_version(objects_of, folder: str, check: Check):
    assert list(check(objects_of(folder))) == []


def test_the_examples_lead_to_the_service(tmp_path: Path):
    objects = combined(tmp_path, [K8S / "base", K8S / "examples"], [])
    assert [fault for check in (*ANY, *SERVER) for fault in check(objects)] == []


def test_the_gateway_lets_through_what_the_client_calls_and_nothing_else():
    route = the(build(K8S / "examples"), "GRPCRoute")
    methods = [match["method"] for rule in route["spec"]["rules"] for match in rule["matches"]]
    assert {method["service"] for method in methods} == {"inference.GRPCInferenceService"}
    client = "".join(path.read_text() for path in (ROOT / "client" / "live_avatar_client").glob("*.py"))
    called = set(re.findall(r"\bstub\.([A-Z]\w+)\(", client))
    assert len(called) > 3
    assert {method["method"] for method in methods} == called


def test_the_job_makes_the_artifacts_that_the_server_reads(objects_of):
    [job] = pod_of(the(objects_of("artifacts"), "Job", "live-avatar-export"))["containers"]
    served = environment(objects_of("overlays/h800"), server_of(objects_of("overlays/h800")))["ARTIFACTS"]
    assert option(objects_of("artifacts"), job, "output") == served


def test_every_volume_claim_and_secret_is_made_by_us_or_named_in_the_readme(objects_of):
    claims = {
        found["metadata"]["name"]
        for folder in ("artifacts", "training")
        for found in of_kind(objects_of(folder), "PersistentVolumeClaim")
    }
    readme = (K8S / "README.md").read_text()
    for folder in ("artifacts", "training", *WITH_SERVER):
        for workload in of_kind(objects_of(folder), "Deployment", "Job"):
            for volume in pod_of(workload)["volumes"]:
                if "persistentVolumeClaim" in volume:
                    assert volume["persistentVolumeClaim"]["claimName"] in claims, folder
                if "secret" in volume:
                    assert volume["secret"]["secretName"] in readme, folder


def test_a_component_changes_the_profile_and_its_gpus_together(objects_of):
    folders = ("base", *(f"components/{name}" for name in ("four-gpu", "two-gpu", "one-gpu", "cpu-only")))
    profiles = {folder: option(objects_of(folder), server_of(objects_of(folder)), "profile") for folder in folders}
    assert list(profiles.values()) == ["gpux5", "gpux4", "gpux2", "gpux1", "cpu"]
    assert [gpus_of(profile) for profile in profiles.values()] == [5, 4, 2, 1, 0]


def test_every_part_of_the_videos_has_a_pod(objects_of):
    """An indexed job sets JOB_COMPLETION_INDEX from 0, which `--part` reads."""
    job = the(objects_of("training"), "Job", "live-avatar-prepare")
    [container] = pod_of(job)["containers"]
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == int(option(objects_of("training"), container, "of"))
    [part] = [one for one in training.prepare.main.params if one.name == "part"]
    assert "JOB_COMPLETION_INDEX" in part.envvar


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_component_changes_what_is_there(objects_of, component: str):
    """kustomize says nothing of a patch whose target does not exist."""
    before = [found for name in ("base", *NEEDS.get(component, ())) for found in objects_of(name)]
    kustomization = yaml.safe_load((K8S / component / "kustomization.yaml").read_text())
    for patch in kustomization.get("patches", []):
        target = patch["target"]
        assert any(
            found["kind"] == target["kind"] and re.fullmatch(target["name"], found["metadata"]["name"])
            for found in before
        ), target
    assert objects_of(component) != before


def test_with_rtx_gpus_engines_and_image_are_of_tensorrt_rtx_and_fit(objects_of):
    objects = objects_of("overlays/rtx")
    [engines] = pod_of(the(objects, "Deployment"))["initContainers"]
    assert option(objects, engines, "target") == "tensorrt-rtx"
    assert option(objects, engines, "compute-capability") == "8.9"
    images = {container["image"] for container in containers(pod_of(the(objects, "Deployment")))}
    assert images == {f"registry.example.com/live-avatar-rtx:{__version__}"}
    free, preset = float(option(objects, engines, "gpu-memory-gib")), S2V_14B.with_precision("bfloat16")
    assert fitting_sessions([denoiser_memory(preset, one_step(1), fp8=True)], free) == 1
    assert fitting_sessions([denoiser_memory(preset, one_step(1))], free) == 0


def test_tls_is_on_where_its_component_is(objects_of):
    def options(folder: str) -> set[str]:
        return {word.partition("=")[0] for word in server_of(objects_of(folder))["args"]}

    tls = {"--tls-certificate", "--tls-key"}
    assert not tls & options("base")
    assert tls <= options("overlays/h800")
    assert options("components/mtls") - options("components/tls") == {"--tls-client-ca"}
    plain, encrypted = (
        {port["appProtocol"] for found in of_kind(objects_of(folder), "Service") for port in found["spec"]["ports"]}
        for folder in ("base", "overlays/h800")
    )
    assert (plain, encrypted) == ({"kubernetes.io/h2c"}, {"https"})


def test_without_a_gpu_nothing_of_a_gpu_is_left(objects_of):
    for folder in ("components/cpu-only", "overlays/cpu-kind"):
        deployment = the(objects_of(folder), "Deployment")
        assert "nvidia" not in str(deployment), folder
        assert all(container["image"].startswith("live-avatar-cpu") for container in containers(pod_of(deployment)))


def test_no_ingress_of_a_namespace_that_was_not_let_in(objects_of):
    policy = the(objects_of("overlays/h800"), "NetworkPolicy")["spec"]
    assert policy["egress"] == []
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert all(peer["namespaceSelector"]["matchLabels"] for rule in policy["ingress"] for peer in rule["from"])
    assert {port["port"] for rule in policy["ingress"] for port in rule["ports"]} == {"grpc", "metrics"}


# Sizes: the comments in the YAML have the sums, live_avatar/graphs/memory.py the terms.


def tensor_bytes() -> dict[str, int]:
    """Bytes of the tensors of the largest request by model, at the released model's sizes: a first block."""
    preset = S2V_14B
    stream, dit = preset.stream, preset.dit
    area = stream.latent_height * stream.latent_width
    latent = 4 * 16 * stream.frames_per_block * area
    audio = 4 * stream.frames_per_block * (5 + 1) * dit.dim
    motion, text = 4 * 16 * 19 * area, 4 * dit.text_len * dit.text_dim
    sink = 4 * 16 * area + motion + text
    frames = 4 * stream.frames_per_block * stream.height * stream.width * 3
    step = latent + audio + sink + latent
    return {
        "avatar_encoder": stream.height * stream.width * 3 + motion + text,
        "conditioning": motion + text + latent + audio + sink,
        **{f"dit_step_{number}": step for number in range(1, stream.steps + 1)},
        "vae_decoder": latent + motion + frames,
        "rolling_sink": 4 * 16 * area,
    }


def frames_bytes() -> int:
    """The gateway's region: blocks of frames of `lone_blocks` and a session (`serving.checks`, `gateway.frames`)."""
    stages = len(load_profile("gpux5").chain)
    stream = S2V_14B.stream
    return (stages + 2 + 1) * FRAMES_PER_BLOCK * stream.height * stream.width * 3


def test_shared_memory_has_room_for_the_largest_requests_and_some_dead_stages(objects_of):
    sizes = tensor_bytes()
    regions = [SHM_GROWTH * size + 2**20 for size in sizes.values()]  # a region starts with 1 MiB
    assert 116 * 2**20 < sum(sizes.values()) < 117 * 2**20  # what the comment says
    assert frames_bytes() == pytest.approx(9 * 9.3 * 2**20, rel=0.01)
    for folder in WITH_SERVER:
        [volume] = [v for v in pod_of(the(objects_of(folder), "Deployment"))["volumes"] if v["name"] == "shared-memory"]
        limit = quantity(volume["emptyDir"]["sizeLimit"])
        assert limit >= frames_bytes() + sum(regions) + 5 * max(regions), folder
        assert limit < quantity(server_of(objects_of(folder))["resources"]["limits"]["memory"]), folder


def test_the_volume_holds_two_releases(objects_of):
    preset = S2V_14B.with_precision("bfloat16")
    step = denoiser_memory(preset, one_step(1)).shared
    transformer = step["weights of the transformer"]
    # Text and speech encoder, audio tokens and VAE: at most all parts that are not the transformer, and one more VAE.
    rest = decoder_memory(preset).shared["weights of two engines"] + (10.6 + 1.2 + 0.4) * GIB
    engines = transformer + step["weights of text and tokens"] + rest
    release = 42.2 * GIB + engines
    assert 84 * GIB < release < 86 * GIB  # what the comment says
    claim = the(objects_of("artifacts"), "PersistentVolumeClaim", "live-avatar-artifacts")
    assert quantity(claim["spec"]["resources"]["requests"]["storage"]) >= 2 * release + transformer


def test_the_hosts_memory_holds_the_stages_and_the_gateways_pictures(objects_of):
    for folder in ("base", "overlays/h800", *(f"components/{number}-gpu" for number in ("four", "two", "one"))):
        container = server_of(objects_of(folder))
        limit = quantity(container["resources"]["limits"]["memory"])
        assert limit >= 8 * 4 * GIB + GIB + gateway_bytes(), folder


def test_the_cpu_pods_memory_holds_its_processes_and_the_gateways_pictures(objects_of):
    for folder in ("components/cpu-only", "overlays/cpu-kind"):
        limit = quantity(server_of(objects_of(folder))["resources"]["limits"]["memory"])
        assert limit >= CPU_PROCESSES_BYTES + gateway_bytes(), folder


def gateway_bytes() -> float:
    """Memory of the gateway, and of as many pictures as it decodes at once."""
    return GIB + AT_ONCE * Limits().memory_mib * MIB


def test_the_gpus_memory_is_asked_for_before_engines_are_built(objects_of):
    objects = objects_of("base")
    [engines] = pod_of(the(objects, "Deployment"))["initContainers"]
    free = float(option(objects, engines, "gpu-memory-gib")) * GIB
    sessions = int(option(objects, engines, "sessions"))
    assert denoiser_memory(S2V_14B.with_precision("bfloat16"), one_step(1)).total(sessions) + WORKSPACE_BYTES < free
    assert sessions == int(option(objects, server_of(objects), "max-sessions"))


def test_named_objects_are_unique(objects_of):
    for folder in FOLDERS:
        names = [named(found) for found in objects_of(folder)]
        assert len(names) == len(set(names)), folder
