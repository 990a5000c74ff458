"""Reads the address of a server: `host:port`, with or without a scheme in front."""

import ipaddress
import re
from typing import Final

from .errors import InvalidInput

_SCHEMES: Final = ("grpc", "grpcs")
# gRPC would take a host with a colon for a scheme of its own, such as unix: or dns:.
_ADDRESS: Final = re.compile(r"(?P<host>\[[^\[\]]+\]|[\w.-]+):(?P<port>[0-9]{1,5})")
_SHORT_LOOPBACK: Final = re.compile(r"127(\.\d+){0,3}")


def parse_url(url: str) -> str:
    """Return the `host:port` of an address, which may have `grpc://` or `grpcs://` in front; raise InvalidInput."""
    if not isinstance(url, str):
        raise InvalidInput(f"url is a {type(url).__name__}; pass a str such as 'localhost:8001'")
    scheme, separator, address = url.rpartition("://")
    if separator and scheme not in _SCHEMES:
        raise InvalidInput(
            f"the address {url!r} has the scheme {scheme!r}, but frames are streamed over gRPC; pass "
            "host:port of the server's gRPC port (8001 unless told otherwise), for TLS with grpcs:// in front"
        )
    parts = _ADDRESS.fullmatch(address)
    host = None if parts is None else _plain_host(parts["host"])
    if parts is None or host is None or not 0 < int(parts["port"]) < 65536:
        raise InvalidInput(
            f"the address {url!r} is not host:port; pass one such as 'localhost:8001', or '[::1]:8001' for IPv6"
        )
    return f"{host}:{parts['port']}"


def is_loopback(url: str) -> bool:
    """Return whether an address is one of this machine, which no network is between; names are not looked up."""
    host = parse_url(url).rpartition(":")[0].strip("[]").rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost") or _SHORT_LOOPBACK.fullmatch(host):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _plain_host(host: str) -> str | None:
    """Return a host as gRPC takes it: letters beyond ASCII as IDNA; None when it can be none."""
    try:
        if host.startswith("["):
            ipaddress.IPv6Address(host[1:-1])
            return host
        return host if host.isascii() else host.encode("idna").decode()
    except ValueError:
        return None
