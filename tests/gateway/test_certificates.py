"""New certificates come into use without a restart, on a real TLS port."""

from __future__ import annotations

import os
import socket
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import trustme

from live_avatar.errors import ServerError
from live_avatar.gateway.certificates import Certificates
from live_avatar.serving.access import Access


class Folder:
    """The files of a server; each `issue` writes a new pair."""

    def __init__(self, path: Path) -> None:
        self.authority = trustme.CA()
        self.access = Access(None, None, path / "server.pem", path / "server.key")
        self.issue("first")

    def issue(self, name: str) -> None:
        made = self.authority.issue_cert("localhost", common_name=name)
        self.write(made.cert_chain_pems[0].bytes(), made.private_key_pem.bytes())

    def write(self, certificate: bytes, key: bytes) -> None:
        assert self.access.tls_certificate is not None
        assert self.access.tls_key is not None
        self.access.tls_certificate.write_bytes(certificate)
        self.access.tls_key.write_bytes(key)
        later_ns = time.time_ns() + 10**9  # the times of two writes may be the same
        os.utime(self.access.tls_certificate, ns=(later_ns, later_ns))


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


@pytest.fixture
def certificates(folder: Folder) -> Certificates:
    return Certificates(folder.access)


@pytest.fixture
def port(certificates: Certificates) -> Iterator[int]:
    server = grpc.server(ThreadPoolExecutor(1))
    number = server.add_secure_port("localhost:0", certificates.credentials())
    server.start()
    yield number
    server.stop(None).wait()


def shown_name(folder: Folder, port: int) -> str:
    """The name in the certificate that a new connection is shown."""
    context = ssl.create_default_context(cadata=folder.authority.cert_pem.bytes().decode())
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("localhost", port), timeout=20.0) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        subject = dict(field[0] for field in secure.getpeercert()["subject"])  # type: ignore[index, misc]
        return str(subject["commonName"])


def test_a_new_certificate_is_shown_to_new_connections(folder: Folder, certificates: Certificates, port: int):
    assert shown_name(folder, port) == "first"
    folder.issue("second")
    assert certificates.reload_if_changed() is None
    assert [shown_name(folder, port) for _ in range(2)] == ["second", "second"]
    assert certificates.reload_if_changed() is None


def test_files_that_do_not_fit_leave_the_old_certificate(folder: Folder, certificates: Certificates, port: int):
    other = folder.authority.issue_cert("localhost")
    assert folder.access.tls_certificate is not None
    folder.write(folder.access.tls_certificate.read_bytes(), other.private_key_pem.bytes())
    fault = certificates.reload_if_changed()
    assert fault is not None
    assert "are no certificate with its key" in fault
    assert certificates.reload_if_changed() is None, "told once"
    assert shown_name(folder, port) == "first"
    folder.access.tls_certificate.unlink()
    fault = certificates.reload_if_changed()
    assert fault is not None
    assert "the certificate cannot be read" in fault
    folder.issue("second")
    assert certificates.reload_if_changed() is None
    assert shown_name(folder, port) == "second"


def test_files_that_cannot_be_used_at_the_start_are_refused(folder: Folder):
    folder.write(b"no certificate", b"no key")
    with pytest.raises(ServerError, match="are no certificate with its key"):
        Certificates(folder.access)
