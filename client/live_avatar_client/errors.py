"""Every exception of the client, in one tree under `AvatarError`."""

# ruff: noqa: N818 - the names say what happened, as httpx's do, and need no suffix.

from .protocol import ErrorCode


class AvatarError(Exception):
    """Anything that this library raises on purpose."""


class AvatarWarning(UserWarning):
    """Something that works, but perhaps not as the application means it."""


class InvalidInput(AvatarError, ValueError):
    """An argument, a chunk of audio or an image that no server would accept."""


class MediaError(AvatarError):
    """A media file that cannot be read or written."""


class ConnectFailed(AvatarError):
    """No server answered at the address."""


class ConnectionLost(AvatarError):
    """The server went away, or closed the stream, before the last frame."""


class ServerIncompatible(AvatarError):
    """The server answers, but not as `live_avatar_client.protocol` says."""


class ServerError(AvatarError):
    """An error that the server reported; `code` is None when the server gave none."""

    def __init__(self, message: str, code: ErrorCode | None = None) -> None:
        super().__init__(message)
        self.code = code


class SessionRefused(ServerError):
    """The server did not open the session: it is full, or the image or prompt does not suit it."""


class SessionFailed(ServerError):
    """The server ended a session that it had accepted."""


class SessionClosed(AvatarError):
    """The session is not open, or has been told that no more speech comes."""


class SessionBusy(AvatarError):
    """A chunk cannot be sent now, and `send` was asked not to wait; nothing of it was taken."""


class SendTimeout(AvatarError, TimeoutError):
    """No block could be sent in time, because answers are missing or nobody reads them."""


class AnswerTimeout(AvatarError, TimeoutError):
    """The server left a block without an answer for too long."""
