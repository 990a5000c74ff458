"""Streams speech to a Live Avatar service and receives the video frames of a person who speaks it.

The names are imported on first use, so a server that needs only `live_avatar_client.protocol` imports neither gRPC
nor numpy. Reading and writing media files is in `live_avatar_client.media` (the extra `media`), a fake
server for tests in `live_avatar_client.testing`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .aio import AsyncAvatarSession
    from .errors import (
        AnswerTimeout,
        AvatarError,
        AvatarWarning,
        ConnectFailed,
        ConnectionLost,
        InvalidInput,
        MediaError,
        SendTimeout,
        ServerError,
        ServerIncompatible,
        SessionBusy,
        SessionClosed,
        SessionFailed,
        SessionRefused,
    )
    from .image import read_image_bytes
    from .messages import Block
    from .protocol import EndReason, ErrorCode, FrameFormat
    from .speakers import Speaker
    from .stats import StreamStats
    from .sync import AvatarSession
    from .tls import TLS

__version__ = "0.1.0"

__all__ = [
    "TLS",
    "AnswerTimeout",
    "AsyncAvatarSession",
    "AvatarError",
    "AvatarSession",
    "AvatarWarning",
    "Block",
    "ConnectFailed",
    "ConnectionLost",
    "EndReason",
    "ErrorCode",
    "FrameFormat",
    "InvalidInput",
    "MediaError",
    "SendTimeout",
    "ServerError",
    "ServerIncompatible",
    "SessionBusy",
    "SessionClosed",
    "SessionFailed",
    "SessionRefused",
    "Speaker",
    "StreamStats",
    "read_image_bytes",
]

_MODULES: Final = {
    "AsyncAvatarSession": "aio",
    "AvatarSession": "sync",
    "Block": "messages",
    "EndReason": "protocol",
    "ErrorCode": "protocol",
    "FrameFormat": "protocol",
    "Speaker": "speakers",
    "StreamStats": "stats",
    "TLS": "tls",
    "read_image_bytes": "image",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f".{_MODULES.get(name, 'errors')}", __name__)
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
