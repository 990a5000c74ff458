"""The web server's routes: the page's files, its settings, and the WebSocket of a conversation."""

import mimetypes
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Final

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as Event
from starlette.websockets import WebSocket

from .conversation import converse
from .guard import Guard
from .options import WebOptions
from .protocol import DEFAULT_LABEL, MAX_PICTURE_BYTES, MAX_TEXT_CHARS, VERSION
from .voices import voice_of

SOCKET_PATH: Final = "/talk"

HEADERS: Final = {
    # The page needs its own files, pictures that it has made itself, and its WebSocket.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; worker-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

_TYPES: Final = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}


def make_app(options: WebOptions) -> ASGIApp:
    """Return the ASGI application; raise OSError for a portrait that cannot be read."""
    guard, voice = Guard(options), voice_of(options)

    async def talk(socket: WebSocket) -> None:
        if not guard.may_connect(socket.headers.get("origin"), socket.headers.get("host", "")):
            await socket.close()  # the handshake is answered with 403
            return
        await socket.accept()
        await converse(socket, options, guard, voice)

    routes = [*_file_routes(), *_portrait_routes(options), Route("/settings.json", _answer(_settings(options)))]
    return _WithHeaders(Starlette(routes=[*routes, WebSocketRoute(SOCKET_PATH, talk)]))


class _WithHeaders:
    """Adds the security headers to every answer, errors included."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(event: Event) -> None:
            if event["type"] == "http.response.start":
                headers = MutableHeaders(scope=event)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(event)

        await self._app(scope, receive, sending)


def _settings(options: WebOptions) -> Response:
    """What the page must know before a session."""
    return JSONResponse(
        {
            "version": VERSION,
            "portraits": list(options.portraits),
            "label": DEFAULT_LABEL,
            "needs_key": options.visitor_key is not None,
            "max_text_chars": MAX_TEXT_CHARS,
            "max_picture_bytes": MAX_PICTURE_BYTES,
        }
    )


def _file_routes() -> Iterable[BaseRoute]:
    """The page's files, read once."""
    folder = files(__package__).joinpath("static")
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        response = Response(file.read_bytes(), media_type=_TYPES[Path(file.name).suffix])
        yield Route("/" if file.name == "index.html" else f"/{file.name}", _answer(response))


def _portrait_routes(options: WebOptions) -> Iterable[BaseRoute]:
    for name, path in options.portraits.items():
        media_type = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        yield Route(f"/portraits/{name}", _answer(Response(path.read_bytes(), media_type=media_type)))


def _answer(response: Response) -> ASGIApp:
    async def answer(request: Request) -> Response:
        return response

    return answer  # type: ignore[return-value]
