"""New certificates come into use without a restart: of TLS on a real port, and those that sign provenance."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import copyfile

import grpc
import pytest

from live_avatar.errors import ServerError, SigningError
from live_avatar.gateway.certificates import Certificates, SigningPair
from live_avatar.serving.provenance import ContentHashes, ProvenanceWriter
from live_avatar.serving.served import Served
from live_avatar.signing import make_pair, verdict
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


# ---- Signatures


def signer_of(pair: SigningPair) -> str:
    """The name of who signs the provenance of the next session."""
    writer = ProvenanceWriter(Served("0.1", "tiny", "fingerprint", "cpu", 1), None, pair.sign)
    return verdict(json.loads(writer.write(1, ContentHashes("a", "b"), 3)), []).signer


def test_a_new_pair_signs_the_next_session(tmp_path: Path):
    first, second = (make_pair(name, tmp_path) for name in ("first", "second"))
    pair = SigningPair(*first[:2])
    assert signer_of(pair) == "first"
    for new, old in zip(second[:2], first[:2], strict=True):
        copyfile(new, old)
    assert signer_of(pair) == "first", "it is read again when it is asked to"
    assert pair.reload_if_changed() is None
    assert signer_of(pair) == "second"
    assert pair.reload_if_changed() is None


def test_files_that_do_not_fit_leave_the_old_pair(tmp_path: Path):
    (certificate, key, _), second = (make_pair(name, tmp_path) for name in ("first", "second"))
    pair = SigningPair(certificate, key)
    copyfile(second[0], certificate)  # half of a renewal
    assert "do not belong together" in str(pair.reload_if_changed())
    assert pair.reload_if_changed() is None, "told once"
    assert signer_of(pair) == "first"
    copyfile(second[1], key)
    assert pair.reload_if_changed() is None
    assert signer_of(pair) == "second"
    certificate.unlink()
    assert "cannot be read (No such file or directory)" in str(pair.reload_if_changed())
    assert signer_of(pair) == "second"
    with pytest.raises(SigningError, match="cannot be read"):
        SigningPair(certificate, key)
