"""The server's certificates, of TLS and for signatures, which are read again when their files change."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from live_avatar.errors import ServerError, SigningError
from live_avatar.gateway.keys import file_version
from live_avatar.serving.access import Access, check_access
from live_avatar.signing import read_signer


class WatchedFiles:
    """Files that may be written again."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._versions = self._current()

    def have_changed(self) -> bool:
        """Whether one was written since the last call."""
        before, self._versions = self._versions, self._current()
        return self._versions != before

    def _current(self) -> list[Any]:
        return [file_version(path) for path in self._paths]


class SigningPair:
    """The certificate and key that sign provenance. Raises `SigningError` if they cannot be used.

    A session that begins after they have changed is signed with the new ones.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        self._paths = (certificate, key)
        self._files = WatchedFiles(self._paths)
        self._signer = read_signer(*self._paths)

    def sign(self, statement: Mapping[str, Any]) -> dict[str, Any]:
        """The statement with its signature."""
        return self._signer.sign(statement)

    def reload_if_changed(self) -> str | None:
        """Reads the files again if one was written since. Files that cannot be used leave the old pair, and give a
        sentence that says why, once until they change again."""
        if not self._files.have_changed():
            return None
        try:
            self._signer = read_signer(*self._paths)
        except SigningError as error:
            return str(error)
        return None


class Certificates:
    """The certificate, its key and the authority of clients in `access`. Raises `ServerError` if they cannot be used.

    New connections get the new certificates; open ones go on with theirs.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self._files = [path for path in (access.tls_certificate, access.tls_key, access.tls_client_ca) if path]
        self._watched = WatchedFiles(self._files)
        self._first = self._read()
        self._next: deque[Any] = deque(maxlen=1)

    def credentials(self) -> grpc.ServerCredentials:
        """For a port of gRPC."""
        needs_client = self._access.tls_client_ca is not None
        return grpc.dynamic_ssl_server_credentials(self._first, self._fetch, require_client_authentication=needs_client)

    def reload_if_changed(self) -> str | None:
        """Reads the files again if one was written since. Files that cannot be used leave the old certificates, and
        give a sentence that says why, once until they change again."""
        if not self._watched.have_changed():
            return None
        try:
            self._next.append(self._read())
        except ServerError as error:
            return str(error)
        return None

    def _fetch(self) -> Any:
        """What the next connection gets if it is new; called from a thread of gRPC at each handshake."""
        try:
            return self._next.pop()
        except IndexError:
            return None

    def _read(self) -> Any:
        check_access(self._access)
        try:
            certificate, key, *rest = (path.read_bytes() for path in self._files)
        except OSError as error:
            raise ServerError(
                f"{error.filename} cannot be read ({error.strerror}); give a file that this user can read."
            ) from error
        return grpc.ssl_server_certificate_configuration([(key, certificate)], rest[0] if rest else None)
