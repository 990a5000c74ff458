"""New certificates come into use without a restart, on a real TLS port."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from live_avatar.errors import ServerError
from live_avatar.gateway.certificates import Certificates
from tests.support.certificates import CertificateFolder, shown_name


@pytest.fixture
def folder(tmp_path: Path) -> CertificateFolder:
    return CertificateFolder(tmp_path)


@pytest.fixture
def certificates(folder: CertificateFolder) -> Certificates:
    return Certificates(folder.access)


@pytest.fixture
def port(certificates: Certificates) -> Iterator[int]:
    server = grpc.server(ThreadPoolExecutor(1))
    number = server.add_secure_port("localhost:0", certificates.credentials())
    server.start()
    yield number
    server.stop(None).wait()


def test_a_new_certificate_is_shown_to_new_connections(
    folder: CertificateFolder, certificates: Certificates, port: int
):
    assert shown_name(folder, port) == "first"
    folder.issue("second")
    assert certificates.reload_if_changed() is None
    assert [shown_name(folder, port) for _ in range(2)] == ["second", "second"]
    assert certificates.reload_if_changed() is None


def test_files_that_do_not_fit_leave_the_old_certificate(
    folder: CertificateFolder, certificates: Certificates, port: int
):
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


def test_files_that_cannot_be_used_at_the_start_are_refused(folder: CertificateFolder):
    folder.write(b"no certificate", b"no key")
    with pytest.raises(ServerError, match="are no certificate with its key"):
        Certificates(folder.access)
