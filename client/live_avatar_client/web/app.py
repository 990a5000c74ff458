"""The web server's routes: the page's files, its settings, and the WebSocket of a conversation."""

import asyncio
import contextlib
import mimetypes
from collections.abc import AsyncIterator, Iterable
from importlib.resources import files
from pathlib import Path
from typing import Final

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as Event
from starlette.websockets import WebSocket

from ..errors import AvatarError
from .conversation import converse
from .guard import Guard
from .options import WebOptions
from .protocol import DEFAULT_LABEL, MAX_PICTURE_BYTES, MAX_TEXT_CHARS, VERSION
from .recording import MAX_RECORDING_S, PATH, Recordings
from .voices import voice_of

SOCKET_PATH: Final = "/talk"
_PIECE_BYTES: Final = 256 * 1024
_DELIVERY_S: Final = 120.0
"""How long a visitor may take to fetch a recording."""

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
    guard, voice, recordings = Guard(options), voice_of(options), Recordings(options.credentials)

    async def talk(socket: WebSocket) -> None:
        if not guard.may_connect(socket.headers.get("origin"), socket.headers.get("host", "")):
            await socket.close()  # the handshake is answered with 403
            return
        await socket.accept()
        await converse(socket, options, guard, voice, recordings)

    async def fetch(request: Request) -> Response:
        if not guard.may_connect(request.headers.get("origin"), request.headers.get("host", "")):
            return JSONResponse({"message": "another site asks for the recording; open the page itself"}, 403)
        try:
            recording = await recordings.fetch(request.path_params["token"])
        except AvatarError as fault:
            return JSONResponse({"message": str(fault)}, 404)
        return _Delivery(recording.file)

    routes = [*_file_routes(), *_portrait_routes(options), Route("/settings.json", _answer(_settings(options)))]
    ways = [WebSocketRoute(SOCKET_PATH, talk), Route(f"{PATH}/{{token}}", fetch, methods=["POST"])]
    return _WithHeaders(Starlette(routes=[*routes, *ways]))


class _Delivery(StreamingResponse):
    """An MP4 for a visitor, who may not take for ever to read it."""

    def __init__(self, file: bytes) -> None:
        super().__init__(_pieces(file), headers={"Content-Length": str(len(file))}, media_type="video/mp4")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DELIVERY_S):
                await super().__call__(scope, receive, send)


async def _pieces(file: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(file), _PIECE_BYTES):
        yield file[start : start + _PIECE_BYTES]


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
            "max_recording_s": MAX_RECORDING_S,
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
