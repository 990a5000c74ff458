"""Listens for visitors with uvicorn until it is told to stop."""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Final

try:
    import uvicorn
except ImportError as error:
    raise ImportError(
        "live_avatar_client.web needs starlette and uvicorn; install them with: pip install 'live-avatar-client[web]'"
    ) from error

from ..errors import InvalidInput
from .app import make_app
from .options import WebOptions
from .protocol import MAX_MESSAGE_BYTES

_POLL_S: Final = 0.1
_SILENT_S: Final = 10
"""How long a visitor may answer no ping; then the connection is closed, and a session's place is free."""
_DEAD_MS: Final = 20_000
"""How long the kernel keeps data that nobody takes."""
_SEND_BUFFER_BYTES: Final = 256 * 1024
"""Of the kernel for each connection (it takes twice as much). A slow visitor is noticed when it is full."""
_MOST_CONNECTIONS: Final = 256
_CLOSING_S: Final = 3


class _Server(uvicorn.Server):
    """uvicorn without signal handlers of its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(options: WebOptions, ready: Callable[[str], object], stopped: Callable[[], bool]) -> None:
    """Serve until `stopped()`; `ready` gets the page's address. Raises InvalidInput if it cannot listen."""
    listening = _listening(options)
    with listening:
        server = _Server(_config(options))
        running = asyncio.create_task(server.serve([listening]))
        while not server.started and not running.done():
            await asyncio.sleep(_POLL_S / 10)
        if not running.done():
            ready(_page_address(options, listening))
        while not running.done() and not stopped():
            await asyncio.sleep(_POLL_S)
        server.should_exit = True
        await running


def _config(options: WebOptions) -> uvicorn.Config:
    context = options.ssl_context()
    return uvicorn.Config(
        make_app(options),
        ws="websockets-sansio",
        ws_max_size=MAX_MESSAGE_BYTES,
        ws_ping_interval=_SILENT_S,
        ws_ping_timeout=_SILENT_S,
        ws_per_message_deflate=False,  # JPEG does not shrink, and a small message could grow without bound
        lifespan="off",
        access_log=False,
        log_config=None,
        log_level="critical",  # what a visitor sends may be in a traceback
        server_header=False,
        proxy_headers=bool(options.origins),
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_graceful_shutdown=_CLOSING_S,
        ssl_context_factory=None if context is None else lambda *_: context,
    )


def _listening(options: WebOptions) -> socket.socket:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it. A visitor who reads nothing would keep a closed connection for ever.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _DEAD_MS)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        listening.bind((options.host, options.port))
        listening.listen()
    except OSError as error:
        listening.close()
        raise InvalidInput(
            f"the web server cannot listen on {options.host} port {options.port}: {error.strerror}; pass another port"
        ) from error
    return listening


def _page_address(options: WebOptions, listening: socket.socket) -> str:
    """The address to open; a key is behind #, which browsers do not send."""
    host, port = listening.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    site = options.origins[0] if options.origins else f"{options.scheme}://{name}:{port}"
    return f"{site}/" + (f"#key={options.visitor_key}" if options.visitor_key is not None else "")
