"""The status record of a ready server, as its model `status` sends it."""

from typing import Any, Final

SERVED: Final[dict[str, Any]] = {
    "version": "0.1.0",
    "preset": "tiny",
    "artifacts": "0123abcd",
    "profile": "cpu",
    "max_sessions": 4,
    "live_sessions": 1,
    "draining": False,
}
