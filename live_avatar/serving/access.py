"""Keys and certificates: the options of an operator, and what is wrong with their files."""

from __future__ import annotations

import ipaddress
import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from live_avatar.errors import ServerError

# Names of the keys: the header is the name in HTTP, and `triton-grpc-protocol-` and the name in gRPC.
MIN_KEY_CHARS, MAX_KEY_CHARS = 16, 256
# Older servers' command lines separated with `,` and `:`; a header has neither spaces nor other letters.
FORBIDDEN_IN_KEYS: Final = re.compile(r"[^!-~]|[,:]")


@dataclass(frozen=True)
class Access:
    """Files with the keys and certificates; without them there is no key and no TLS.

    `api_key_file` is for callers, `admin_key_file` for operators. `tls_certificate` (the server's own, with those
    between it and its root) and `tls_key` go together; with `tls_client_ca` a client needs a certificate that this
    authority has signed.
    """

    api_key_file: Path | None = None
    admin_key_file: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None


def check_access(access: Access) -> None:
    """Raises `ServerError` for certificates that cannot be used, or options of TLS without the others."""
    certificate, key, client_ca = access.tls_certificate, access.tls_key, access.tls_client_ca
    if certificate is None or key is None:
        _expect_no_tls(access)
        return
    _check_pair(certificate, key)
    if client_ca is not None:
        _check_authority(client_ca)


def access_warnings(access: Access, address: str) -> list[str]:
    """A sentence for each thing that is open to everybody who can reach `address`, but for callers on this machine."""
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
    """Whether only this machine reaches `address`. A name other than localhost counts as reachable for others."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def read_key(path: Path) -> str:
    """The key in a file. Raises `ServerError`, which does not say the key, if it cannot be read or used."""
    text = _read(path, "key").decode("utf-8", errors="replace")
    if fault := _fault(text.removesuffix("\n").removesuffix("\r")):
        raise ServerError(
            f"{path} {fault}; expected one line with a key of {MIN_KEY_CHARS} to {MAX_KEY_CHARS} printable ASCII "
            "characters without spaces, ',' and ':'; make one with "
            f"`python3 -c 'import secrets; print(secrets.token_hex(32))' > {path}`."
        )
    return text.strip()


def _fault(key: str) -> str | None:
    """What is wrong with a key, in words that do not give it away."""
    if "\n" in key:
        return f"has {key.count(chr(10)) + 1} lines"
    if found := FORBIDDEN_IN_KEYS.search(key):
        return f"has a character at position {found.start() + 1} that a key cannot have"
    if not MIN_KEY_CHARS <= len(key) <= MAX_KEY_CHARS:
        return f"holds a key of {len(key)} characters"
    return None


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
