"""The health port: liveness and readiness for probes, from a process that callers' connections do not reach."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from aiohttp import web
from aiohttp.http import HttpProcessingError

from live_avatar.errors import ServerError

MAX_BODY_BYTES: Final = 1024  # no handler reads a body
KEEP_ALIVE_S: Final = 15.0

log = logging.getLogger(__name__)
# What is no HTTP is answered, and not logged: aiohttp would write words of the caller into a line of their own.
log.addFilter(lambda record: not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError)))


def health_routes(is_ready: Callable[[], bool]) -> list[web.RouteDef]:
    """`/v2/health/live` and `/v2/health/ready`, as KServe v2 has them."""

    async def live(request: web.Request) -> web.Response:
        return web.Response()

    async def ready(request: web.Request) -> web.Response:
        return web.Response(status=200 if is_ready() else 503)

    return [web.get("/v2/health/live", live), web.get("/v2/health/ready", ready)]


async def listen(routes: list[web.RouteDef], address: str, port: int, option: str) -> web.AppRunner:
    """Serves the routes until the runner is cleaned up.

    Raises `ServerError` for an address or port that cannot be used; `option` is the one to change.
    """
    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.add_routes(routes)
    limits: dict[str, Any] = {"max_line_size": 4096, "max_field_size": 4096, "keepalive_timeout": KEEP_ALIVE_S}
    runner = web.AppRunner(app, access_log=None, handle_signals=False, logger=log, **limits)
    await runner.setup()
    try:
        await web.TCPSite(runner, address, port).start()
    except OSError as error:
        await runner.cleanup()
        raise ServerError(
            f"cannot listen on {address}:{port} ({error.strerror}); choose another {option} or --address."
        ) from error
    return runner


@contextmanager
def health_port(address: str, port: int | None, is_ready: Callable[[], bool]) -> Iterator[None]:
    """Answers probes in a thread while the `with` lasts; without a port does nothing. Raises as `listen` does."""
    if port is None:
        yield
        return
    loop = asyncio.new_event_loop()
    try:
        runner = loop.run_until_complete(listen(health_routes(is_ready), address, port, "--health-port"))
        thread = threading.Thread(target=loop.run_forever, name="health", daemon=True)
        thread.start()
        try:
            yield
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.run_until_complete(runner.cleanup())
    finally:
        loop.close()
