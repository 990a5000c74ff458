"""The status of a ready server: the record that its model `status` sends, and what the client makes of it."""

from typing import Any, Final

from live_avatar_client.status import KeyState, ServerStatus

SERVED: Final[dict[str, Any]] = {
    "version": "0.1.0",
    "preset": "tiny",
    "artifacts": "0123abcd",
    "profile": "cpu",
    "max_sessions": 4,
    "live_sessions": 1,
    "draining": False,
}

READY: Final = ServerStatus(
    url="localhost:8001",
    live=True,
    ready=True,
    round_trip_s=0.00123,
    tls=False,
    key=KeyState.NOT_NEEDED,
    **SERVED,
)
