"""Decides who may open a session: the page's origin, the visitor's key, and the number of sessions of an address."""

import asyncio
import ipaddress
import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final
from urllib.parse import urlsplit

from .options import WebOptions
from .protocol import Fault

_WRONG_KEY_S: Final = 1.0
"""How long the answer to a wrong key takes."""
_MOST_OPEN: Final = 200
"""Conversations of all addresses together."""
_LOCAL_NAMES: Final = ("127.0.0.1", "localhost", "::1")
_IPV6_NETWORK_BITS: Final = 64


class RefusalError(Exception):
    """A visitor may not open a session; the message tells them why."""

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.fault = fault


class Guard:
    """Counts the connections of each address, and checks origins and keys."""

    def __init__(self, options: WebOptions) -> None:
        self._options = options
        self._open: Counter[str] = Counter()

    def may_connect(self, origin: str | None, host: str) -> bool:
        """Return whether a page of this origin may connect. Programs that are no browsers have none.

        On loopback only names of this machine count: another name that leads here belongs to somebody else's page.
        """
        if origin is None or origin in self._options.origins:
            return True
        page = urlsplit(origin)
        if self._options.is_local and page.hostname not in _LOCAL_NAMES:
            return False
        return page.scheme == self._options.scheme and page.netloc == host

    async def check_key(self, key: str) -> None:
        """Raise RefusalError, after a second, unless this is the visitors' key."""
        expected = self._options.visitor_key
        if expected is None or secrets.compare_digest(key.encode(), expected.encode()):
            return
        await asyncio.sleep(_WRONG_KEY_S)
        fault = "is wrong" if key else "is missing"
        raise RefusalError(Fault.KEY, f"the key {fault}; open the page with the whole address that you were given")

    @contextmanager
    def place(self, address: str) -> Iterator[None]:
        """Hold one of the places of an address; raise RefusalError when all are taken."""
        name, most = network(address), self._options.sessions_per_address
        if self._open[name] >= most:
            raise RefusalError(
                Fault.FULL, f"your address has {most} conversations open, the limit; close one of them, and try again"
            )
        if self._open.total() >= _MOST_OPEN:
            raise RefusalError(Fault.FULL, f"the page has {_MOST_OPEN} conversations open, the limit; try again later")
        self._open[name] += 1
        try:
            yield
        finally:
            self._open[name] -= 1
            if not self._open[name]:
                del self._open[name]


def network(address: str) -> str:
    """Return the address, or of IPv6 the network that one household has."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if parsed.version == 4:
        return address
    return str(ipaddress.ip_network((parsed, _IPV6_NETWORK_BITS), strict=False))
