"""k8s/README.md: its commands name what there is, those that need no cluster are run, its sums are right."""

from __future__ import annotations

import base64
import math
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from live_avatar.cli.main import doctor
from tests.k8s.checks import gpus_of
from tests.k8s.manifests import K8S, ROOT, Object, build, mount_of, of_kind, pod_of, server_of, workloads
from tests.k8s.observing import pods_wanted
from tests.k8s.programs import program, tool

README = (K8S / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"^```\n(.*?)^```", README, re.M | re.S) for line in block.splitlines()]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with what the commands before `kubectl` make; keys are their own name."""
    [words] = [line.split()[1:] for line in COMMANDS if line.startswith("openssl ")]
    subprocess.run([program("openssl"), *words], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    for name in ("api-keys", "ca.crt"):
        (tmp_path / name).write_text(name)
    return tmp_path


def created(command: str, files: Path) -> Object:
    """The Secret that a `kubectl create secret` would make."""
    words = [tool("kubectl"), *command.split()[1:], "--dry-run=client", "--output=yaml"]
    result = subprocess.run(words, cwd=files, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    found: Object = yaml.safe_load(result.stdout)
    return found


def secret_commands(name: str) -> list[str]:
    return [
        part
        for line in COMMANDS
        for part in re.split(r" && | \| ", line)
        if "create secret" in part and f" {name} " in part
    ]


def test_every_folder_and_file_of_a_command_is_there():
    folders = re.findall(r"kubectl \w+ -k ([\w/-]+)", README)
    assert {"k8s/namespace", "k8s/artifacts", "k8s/overlays/h800", "k8s/overlays/cpu-kind"} <= set(folders)
    for folder in set(folders):
        assert build(ROOT / folder)
    for file in re.findall(r"-f ([\w./-]+)", "\n".join(COMMANDS)):
        assert (ROOT / file).is_file(), file


def test_every_object_of_a_command_is_there():
    objects = [found for folder in ("artifacts", "overlays/h800") for found in build(K8S / folder)]
    known = {f"{found['kind'].lower()}/{found['metadata']['name']}" for found in objects}
    named = set(re.findall(r"\b(?:deployment|job)/[a-z-]+", "\n".join(COMMANDS)))
    assert named == {"deployment/live-avatar", "job/live-avatar-export"}
    assert named <= known


@pytest.mark.k8s
def test_the_secrets_have_the_files_that_the_server_is_given(files: Path):
    server = server_of(build(K8S / "overlays" / "h800"))
    given = [word.partition("=")[2] for word in server["args"] if re.search("=/(keys|tls)/", word)]
    assert len(given) == 3
    volumes = {v["name"]: v for w in workloads(build(K8S / "overlays" / "h800")) for v in pod_of(w)["volumes"]}
    for path in given:
        mount = mount_of(server, path)
        assert mount is not None
        secret = volumes[mount["name"]]["secret"]["secretName"]
        for command in secret_commands(secret):
            assert Path(path).name in created(command, files)["data"], command


@pytest.mark.k8s
def test_the_secret_for_mutual_tls_has_the_authority(files: Path):
    (command,) = [command for command in secret_commands("live-avatar-tls") if "ca.crt" in command]
    secret = created(command, files)
    assert secret["type"] == "kubernetes.io/tls"
    assert base64.b64decode(secret["data"]["ca.crt"]) == b"ca.crt"


@pytest.mark.k8s
def test_the_certificate_names_every_service(files: Path):
    command = [program("openssl"), "x509", "-in", "tls.crt", "-noout", "-ext", "subjectAltName"]
    said = subprocess.run(command, cwd=files, check=True, capture_output=True, text=True, timeout=60).stdout
    for service in of_kind(build(K8S / "base"), "Service"):
        assert f"DNS:{service['metadata']['name']}.live-avatar.svc" in said


def test_the_options_of_doctor_exist():
    [command] = [line for line in COMMANDS if line.startswith("live-avatar doctor")]
    assert set(re.findall(r"--[a-z-]+", command)) <= {name for option in doctor.params for name in option.opts}


def test_the_table_of_costs():
    rows = re.findall(r"^\| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", README, re.M)
    assert len(rows) == 4
    for live, pods, five, four in rows:
        assert int(pods) == math.ceil(pods_wanted(int(live), 1))
        for profile, cost in (("gpux5", five), ("gpux4", four)):
            exact = gpus_of(profile) * int(pods) / int(live)
            assert float(cost) == pytest.approx(exact, abs=0.051), (live, profile)


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", README + (K8S / "ALERTS.md").read_text()):
        assert (K8S / target).exists(), target


def test_the_tree_shows_every_folder():
    [tree] = re.findall(r"^k8s/\n(.*?)^```", README, re.M | re.S)
    shown = set(re.findall(r"^  ([\w.-]+)", tree, re.M))
    assert shown | {"README.md", "ALERTS.md"} == {path.name for path in K8S.iterdir()}
    [components] = re.findall(r"^  components/ +(.*?):", tree, re.M)
    assert set(components.split(", ")) == {path.name for path in (K8S / "components").iterdir()}
