"""Access to the server's ports, as options of Triton: TLS, keys, and closed endpoints.

The stream uses gRPC, which has TLS. Triton's HTTP has no TLS, so it serves only health and metadata. Only the
supervisor may load and unload models, with a random secret of each start.
"""

from __future__ import annotations

import ipaddress
import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from live_avatar.errors import ServerError

# Names of the keys. The HTTP header is the name; the gRPC header is `triton-grpc-protocol-` and the name.
API_KEY: Final = "api-key"
ADMIN_KEY: Final = "admin-key"
SUPERVISOR_KEY: Final = "supervisor-key"

INFERENCE: Final = "inference"
MODEL_CONTROL: Final = "model-repository"
# Endpoints for operators; callers do not need them.
OPERATION: Final = ("shared-memory", "trace", "logging", "statistics", "model-config")

MIN_KEY_CHARS, MAX_KEY_CHARS = 16, 256
# Triton uses `,` and `:` as separators, and a header has neither spaces nor letters beyond ASCII.
FORBIDDEN_IN_KEYS: Final = re.compile(r"[^!-~]|[,:]")


@dataclass(frozen=True)
class Access:
    """Files with the keys and certificates; None means no key or no TLS.

    `api_key_file` is for callers, `admin_key_file` for operators. `tls_certificate` (the server's certificate with
    its chain) needs `tls_key`; with `tls_client_ca` each client needs a certificate that this authority has signed.
    """

    api_key_file: Path | None = None
    admin_key_file: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None


def access_flags(access: Access, address: str, secret: str) -> list[str]:
    """Triton's options for a server that listens on `address` and whose supervisor knows `secret`.

    They contain the keys. Raises `ServerError` for a key or certificate that cannot be used.
    """
    api_key = None if access.api_key_file is None else read_key(access.api_key_file)
    admin_key = None if access.admin_key_file is None else read_key(access.admin_key_file)
    if api_key is not None and api_key == admin_key:
        raise ServerError(
            f"{access.api_key_file} and {access.admin_key_file} hold the same key, so that every caller would be an "
            "operator; put another key into one of them."
        )
    flags = [
        _restricted("http-restricted-api", (INFERENCE, MODEL_CONTROL, *OPERATION), SUPERVISOR_KEY, secret),
        _restricted("grpc-restricted-protocol", (MODEL_CONTROL,), SUPERVISOR_KEY, secret),
    ]
    if api_key is not None:
        flags.append(_restricted("grpc-restricted-protocol", (INFERENCE,), API_KEY, api_key))
    if admin_key is not None:
        flags.append(_restricted("grpc-restricted-protocol", OPERATION, ADMIN_KEY, admin_key))
    elif not is_loopback(address):
        flags.append(_restricted("grpc-restricted-protocol", OPERATION, SUPERVISOR_KEY, secret))
    return flags + _tls_flags(access)


def access_warnings(access: Access, address: str) -> list[str]:
    """A sentence for each endpoint that is open to every other machine that can reach `address`."""
    if is_loopback(address):
        return []
    warnings = []
    if access.api_key_file is None:
        warnings.append(
            f"the server listens on {address} without an API key, so everybody who can reach it can open sessions; "
            "give --api-key-file, or --address 127.0.0.1."
        )
    if access.tls_certificate is None:
        warnings.append(
            f"the server listens on {address} without TLS, so pictures, speech, frames and keys can be read on the "
            "way; give --tls-certificate and --tls-key, or --address 127.0.0.1."
        )
    return warnings


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach `address`. Of names, only localhost counts as local."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def read_key(path: Path) -> str:
    """The key in a file. Raises `ServerError`, without the key in its message, if it cannot be read or used."""
    text = _read(path, "key").decode("utf-8", errors="replace")
    if fault := _fault(text.removesuffix("\n").removesuffix("\r")):
        raise ServerError(
            f"{path} {fault}; expected one line with a key of {MIN_KEY_CHARS} to {MAX_KEY_CHARS} printable ASCII "
            "characters without spaces, ',' and ':'; make one with "
            f"`python3 -c 'import secrets; print(secrets.token_hex(32))' > {path}`."
        )
    return text.strip()


def _fault(key: str) -> str | None:
    """The fault of a key, without the key itself; None if there is none."""
    if "\n" in key:
        return f"has {key.count(chr(10)) + 1} lines"
    if found := FORBIDDEN_IN_KEYS.search(key):
        return f"has a character at position {found.start() + 1} that a key cannot have"
    if not MIN_KEY_CHARS <= len(key) <= MAX_KEY_CHARS:
        return f"holds a key of {len(key)} characters"
    return None


def _restricted(option: str, groups: tuple[str, ...], name: str, key: str) -> str:
    return f"--{option}={','.join(groups)}:{name}={key}"


def _tls_flags(access: Access) -> list[str]:
    certificate, key, client_ca = access.tls_certificate, access.tls_key, access.tls_client_ca
    if certificate is None or key is None:
        _expect_no_tls(access)
        return []
    _check_pair(certificate, key)
    flags = [f"--grpc-server-cert={certificate.resolve()}", f"--grpc-server-key={key.resolve()}"]
    if client_ca is None:
        return ["--grpc-use-ssl=true", *flags]
    _check_authority(client_ca)
    return ["--grpc-use-ssl-mutual=true", *flags, f"--grpc-root-cert={client_ca.resolve()}"]


def _expect_no_tls(access: Access) -> None:
    options = {
        "--tls-certificate": access.tls_certificate,
        "--tls-key": access.tls_key,
        "--tls-client-ca": access.tls_client_ca,
    }
    given = [f"{option} {path}" for option, path in options.items() if path is not None]
    if given:
        missing = [option for option in ("--tls-certificate", "--tls-key") if options[option] is None]
        raise ServerError(
            f"{' and '.join(given)}: TLS needs the server's certificate and its key; give {' and '.join(missing)} too."
        )


def _check_pair(certificate: Path, key: Path) -> None:
    for path, what in ((certificate, "certificate"), (key, "private key")):
        _read(path, what)
    try:
        # Without a password of its own, OpenSSL would ask for it on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        raise ServerError(
            f"{certificate} and {key} are no certificate with its key ({_reason(error)}); give two PEM files, the "
            "key without a password."
        ) from error


def _check_authority(path: Path) -> None:
    _read(path, "certificate")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(path)
    except ssl.SSLError as error:
        raise ServerError(
            f"{path} holds no certificate of an authority ({_reason(error)}); give a PEM file as --tls-client-ca."
        ) from error


def _reason(error: ssl.SSLError) -> str:
    return error.reason.lower().replace("_", " ") if error.reason else "cannot be read as PEM without a password"


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ServerError(
            f"{path}: the {what} cannot be read ({error.strerror}); give a file that this user can read."
        ) from error
