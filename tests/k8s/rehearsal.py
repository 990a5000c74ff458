"""Real parts for rehearsals on one machine: two servers, a proxy before them, Prometheus; on free ports."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import urllib.parse
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trustme

from live_avatar.graphs.artifacts import Artifacts
from live_avatar.serving.server_options import ServerOptions
from live_avatar.serving.supervisor import WITHOUT_PROXY
from live_avatar_client import TLS
from tests.cli.support import Running, served, wait_until
from tests.k8s.manifests import K8S
from tests.k8s.programs import program
from tests.serving.support import Numbers, scrape

CONFIGURATIONS = K8S / "rehearsal"
STOP_S = 10.0


@dataclass(frozen=True)
class Server:
    """A `live-avatar serve` in a process of its own."""

    running: Running
    options: ServerOptions

    def numbers(self) -> Numbers:
        return scrape(self)  # which looks at the options alone

    def process_of(self, stage: str) -> int:
        [found] = [number for number, line in self.running.processes() if f"/{stage}/1/model.py" in line]
        return found

    def gateway(self) -> int:
        [found] = [number for number, line in self.running.processes() if line.rstrip().endswith("live_avatar.gateway")]
        return found


@contextmanager
def two_servers(folder: Path, artifacts: Artifacts, *options: object) -> Iterator[tuple[Server, Server]]:
    with (
        served(folder / "a", artifacts, *options) as first,
        served(folder / "b", artifacts, *options) as second,
    ):
        yield Server(*first), Server(*second)


def write_configuration(name: str, folder: Path, **values: object) -> Path:
    """A file of k8s/rehearsal with a value for every @name@."""
    path = folder / name
    text = (CONFIGURATIONS / name).read_text()
    path.write_text(re.sub(r"@(\w+)@", lambda found: str(values[found[1]]), text))
    return path


@contextmanager
def started(log: Path, *command: object, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A program that listens on `port` inside the `with`, and is gone after it."""
    with log.open("wb") as said, subprocess.Popen([*map(str, command)], stdout=said, stderr=said) as process:
        try:
            wait_until(lambda: process.poll() is not None or _listens(port))
            assert process.poll() is None, log.read_text()
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Proxy(ABC):
    """What stands before two servers, with its address for clients."""

    tls: TLS | None = None

    def __init__(self, folder: Path, port: int, servers: tuple[Server, Server]) -> None:
        self.url = f"127.0.0.1:{port}"
        self.port = port
        self._folder = folder
        self._values: dict[str, object] = {"port": port}
        for name, server in zip("ab", servers, strict=True):
            self._values |= {f"{name}_grpc": server.options.grpc_port, f"{name}_http": server.options.http_port}

    @property
    @abstractmethod
    def command(self) -> list[object]: ...

    @abstractmethod
    def take_out_first(self, process: subprocess.Popen[bytes]) -> None:
        """Called when the first server begins to drain."""


class HAProxy(Proxy):
    @property
    def command(self) -> list[object]:
        return [program("haproxy"), "-f", write_configuration("haproxy.cfg", self._folder, **self._values)]

    def take_out_first(self, process: subprocess.Popen[bytes]) -> None:
        """It sees for itself that the server is not ready."""


class Nginx(Proxy):
    def __init__(self, folder: Path, port: int, servers: tuple[Server, Server]) -> None:
        super().__init__(folder, port, servers)
        authority = trustme.CA()
        own = authority.issue_cert("127.0.0.1")
        authority.cert_pem.write_to_path(str(folder / "ca.pem"))
        own.cert_chain_pems[0].write_to_path(str(folder / "server.pem"))
        own.private_key_pem.write_to_path(str(folder / "server.key"))
        self.tls = TLS(str(folder / "ca.pem"))
        self._values |= {"certificate": folder / "server.pem", "key": folder / "server.key", "a_state": ""}

    @property
    def command(self) -> list[object]:
        self._write()
        return [program("nginx"), "-p", self._folder, "-c", "nginx.conf"]

    def take_out_first(self, process: subprocess.Popen[bytes]) -> None:
        self._values["a_state"] = "down"
        self._write()
        process.send_signal(signal.SIGHUP)

    def _write(self) -> None:
        write_configuration("nginx.conf", self._folder, **self._values)


class Prometheus:
    """Its HTTP API."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def is_ready(self) -> bool:
        """It listens before it answers."""
        try:
            with WITHOUT_PROXY.open(f"{self._url}/-/ready", timeout=60.0):
                return True
        except OSError:
            return False

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Series with their values at this moment."""
        found: list[dict[str, Any]] = self._ask("query", query=expression)["result"]
        return found

    def firing(self) -> set[str]:
        return {alert["labels"]["alertname"] for alert in self._ask("alerts")["alerts"] if alert["state"] == "firing"}

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self._ask("rules")["groups"] for rule in group["rules"]]

    def _ask(self, what: str, **parameters: str) -> Any:
        url = f"{self._url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        with WITHOUT_PROXY.open(url, timeout=60.0) as answer:
            return json.load(answer)["data"]
