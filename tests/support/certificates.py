"""Certificates of a server that change, and what a new connection is shown of them."""

from __future__ import annotations

import os
import socket
import ssl
import time
from pathlib import Path

import trustme

from live_avatar.serving.access import Access


class CertificateFolder:
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


def shown_name(folder: CertificateFolder, port: int) -> str:
    """The name in the certificate that a new connection is shown."""
    context = ssl.create_default_context(cadata=folder.authority.cert_pem.bytes().decode())
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("localhost", port), timeout=20.0) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        subject = dict(field[0] for field in secure.getpeercert()["subject"])  # type: ignore[index, misc]
        return str(subject["commonName"])
