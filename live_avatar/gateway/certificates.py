"""The server's TLS certificates, which are read again when their files change."""

from __future__ import annotations

from collections import deque
from typing import Any

import grpc

from live_avatar.errors import ServerError
from live_avatar.gateway.keys import file_version
from live_avatar.serving.access import Access, check_access


class Certificates:
    """The certificate, its key and the authority of clients in `access`. Raises `ServerError` if they cannot be used.

    New connections get the new certificates; open ones go on with theirs.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self._files = [path for path in (access.tls_certificate, access.tls_key, access.tls_client_ca) if path]
        self._versions = self._current_versions()
        self._first = self._read()
        self._next: deque[Any] = deque(maxlen=1)

    def credentials(self) -> grpc.ServerCredentials:
        """For a port of gRPC."""
        needs_client = self._access.tls_client_ca is not None
        return grpc.dynamic_ssl_server_credentials(self._first, self._fetch, require_client_authentication=needs_client)

    def reload_if_changed(self) -> str | None:
        """Reads the files again if one was written since. Files that cannot be used leave the old certificates, and
        give a sentence that says why, once until they change again."""
        versions = self._current_versions()
        if versions == self._versions:
            return None
        self._versions = versions
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

    def _current_versions(self) -> list[Any]:
        return [file_version(path) for path in self._files]
