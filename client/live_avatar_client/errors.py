"""Every exception of the client, in one tree under `AvatarError`."""

# ruff: noqa: N818 - the names say what happened, as httpx's do, and need no suffix.

from .protocol import ErrorCode


class AvatarError(Exception):
    """Anything that this library raises on purpose."""


class AvatarWarning(UserWarning):
    """Something that works, but perhaps not as the application means it."""


class InvalidInput(AvatarError, ValueError):
    """An argument, a chunk of audio or an image is invalid."""


class MediaError(AvatarError):
    """A media file cannot be read or written."""


class ConnectFailed(AvatarError):
    """No server answered at the address."""


class ConnectionLost(AvatarError):
    """The server went away, or closed the stream, before the last frame."""


class ServerIncompatible(AvatarError):
    """The server's answers do not follow `live_avatar_client.protocol`."""


class ServerError(AvatarError):
    """An error that the server reported; `code` is None when the server gave none."""

    def __init__(self, message: str, code: ErrorCode | None = None) -> None:
        super().__init__(message)
        self.code = code


class SessionRefused(ServerError):
    """The server did not open the session: it is full, or the image or prompt is not accepted."""


class SessionFailed(ServerError):
    """The server ended a session that it had accepted."""


class SessionClosed(AvatarError):
    """The session is not open, or its speech was ended."""


class SessionBusy(AvatarError):
    """A chunk cannot be sent now and `send` must not wait; nothing of it was taken."""


class SendTimeout(AvatarError, TimeoutError):
    """No block could be sent in time, because answers are missing or not read."""


class AnswerTimeout(AvatarError, TimeoutError):
    """The server did not answer a request in time."""
