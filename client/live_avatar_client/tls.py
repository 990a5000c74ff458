"""Certificates of a session's connection: TLS and mutual TLS."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import grpc

from .errors import InvalidInput

File: TypeAlias = str | os.PathLike[str]


@dataclass(frozen=True)
class TLS:
    """The certificates of a connection, as paths of PEM files."""

    root_certificates: File | None = None
    """Authorities that are trusted to sign the server's certificate; None trusts gRPC's public ones."""
    certificate: File | None = None
    """The client's certificate with its chain, for a server that requires one."""
    private_key: File | None = None
    """The key of `certificate`."""
    server_name: str | None = None
    """The name in the server's certificate, if it differs from the host in the address."""

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files; raise InvalidInput when one cannot be read or is not a PEM file."""
        if (self.certificate is None) != (self.private_key is None):
            given, missing = ("certificate", "private_key")[:: 1 if self.certificate is not None else -1]
            raise InvalidInput(f"TLS has a {given} but no {missing}; pass both, or neither")
        return grpc.ssl_channel_credentials(
            root_certificates=_pem("root_certificates", self.root_certificates),
            private_key=_pem("private_key", self.private_key),
            certificate_chain=_pem("certificate", self.certificate),
        )


def _pem(name: str, path: File | None) -> bytes | None:
    if path is None:
        return None
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InvalidInput(
            f"the {name} {os.fspath(path)!r} cannot be read: {error.strerror}; pass the path of a PEM file"
        ) from error
    if b"-----BEGIN" not in data:
        raise InvalidInput(f"the {name} {os.fspath(path)!r} has no -----BEGIN line; pass the path of a PEM file")
    return data
