"""Formats a server's status for `live-avatar doctor`, as text or JSON, and chooses the exit code."""

from __future__ import annotations

import dataclasses
import json

from live_avatar_client.status import KeyState, ServerStatus

READY, NOT_READY = 0, 1

KEY_WORDS = {
    KeyState.NOT_NEEDED: "not needed",
    KeyState.ACCEPTED: "accepted",
    KeyState.MISSING: "missing: the server expects one; give --api-key-file",
    KeyState.REFUSED: "refused: the server expects a different key than that of --api-key-file",
}


def exit_code(status: ServerStatus) -> int:
    """0 if a session can be opened now with the given key, otherwise 1."""
    return READY if status.ready and status.free_sessions else NOT_READY


def as_lines(status: ServerStatus) -> list[str]:
    """Returns the status as lines of text."""
    return [
        f"server      {status.url}{f', version {status.version}' if status.version else ''}",
        f"alive       {_yes(status.live)}",
        f"ready       {_yes(status.ready)}{', it is shutting down' if status.draining else ''}",
        f"serves      {_serves(status)}",
        f"sessions    {_sessions(status)}",
        f"round trip  {status.round_trip_s * 1000:.1f} ms",
        f"TLS         {_yes(status.tls)}",
        f"API key     {KEY_WORDS[status.key]}",
    ]


def as_json(status: ServerStatus) -> str:
    """Returns the status as JSON, `free_sessions` included; unknown values are null."""
    return json.dumps(dataclasses.asdict(status) | {"free_sessions": status.free_sessions}, indent=2)


def _serves(status: ServerStatus) -> str:
    if status.preset is None:
        return "not known"
    return f"preset {status.preset}, profile {status.profile}, artifacts {status.artifacts}"


def _sessions(status: ServerStatus) -> str:
    if status.free_sessions is None:
        return "not known"
    return f"{status.free_sessions} of {status.max_sessions} free"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
