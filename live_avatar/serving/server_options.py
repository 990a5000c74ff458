"""What to serve and where."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from live_avatar.serving.access import Access

ANY_ADDRESSES: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Addresses to listen on that no client can connect to, and the one for clients on this machine."""


@dataclass(frozen=True)
class ServerOptions:
    """The options of a server; None keeps the value of the profile.

    profile: the name of a shipped one, or a file (`serving.profiles`). known_avatar_seconds: how long a caller's
    avatar is remembered after its last use. share_avatars: callers without keys reuse one another's avatars.
    sessions_per_key and starts_per_minute: limits of each caller. longest_session_seconds: after it a session ends.
    answer_seconds: how long the pipe may take for an answer; then the session ends, and a stage that is stuck is
    started again. log_format: plain or json. log_hashes: whether the log has the hashes of picture and prompt. trace: a
    folder for the busy intervals of the stages.

    label: is on every frame of all sessions. watermark: the file with the key of the invisible mark, and operator: the
    number in it. sign_certificate and sign_key: sign the provenance of sessions.

    For measurements: stage_floor_s is the least time that a stage takes for a block; turns are stages of which only
    one works at a time, as if they shared a processor.
    """

    artifacts: Path
    profile: str = "cpu"
    address: str = "127.0.0.1"
    grpc_port: int = 8001
    http_port: int = 8000
    metrics_port: int = 8002
    health_port: int | None = None
    max_sessions: int | None = None
    idle_seconds: float | None = None
    known_avatars: int | None = None
    label_font: Path | None = None
    label: str | None = None
    watermark: Path | None = None
    operator: int | None = None
    sign_certificate: Path | None = None
    sign_key: Path | None = None
    known_avatar_seconds: float = 3600.0
    share_avatars: bool = False
    sessions_per_key: int | None = None
    starts_per_minute: int | None = None
    longest_session_seconds: float | None = None
    answer_seconds: float = 60.0
    access: Access = field(default_factory=Access)
    log_format: str = "plain"
    log_hashes: bool = False
    trace: Path | None = None
    stage_floor_s: float = 0.0
    turns: tuple[str, ...] = ()
    verbose: bool = False

    def on_free_ports(self) -> ServerOptions:
        """The same options with ports that are free now, for tests and demos on this machine."""
        grpc_port, http_port, metrics_port, health_port = free_ports(4)
        return replace(
            self,
            grpc_port=grpc_port,
            http_port=http_port,
            metrics_port=metrics_port,
            health_port=None if self.health_port is None else health_port,
        )

    @property
    def host(self) -> str:
        """The address for clients on this machine."""
        host = ANY_ADDRESSES.get(self.address, self.address)
        return f"[{host}]" if ":" in host else host

    @property
    def url(self) -> str:
        """The address and port for a gRPC client on this machine."""
        return f"{self.host}:{self.grpc_port}"


def free_ports(count: int) -> list[int]:
    """Different ports that are free on loopback now: each is held until all are found."""
    with ExitStack() as held:
        probes = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(probe.getsockname()[1]) for probe in probes]
