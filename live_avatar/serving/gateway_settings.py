"""Settings of the gateway: `live-avatar serve` writes them as one JSON line to its standard input."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from live_avatar.serving.served import Served


@dataclass(frozen=True)
class Limits:
    """What callers may use. None: no limit.

    pipe_blocks: blocks of all sessions in the pipe at once while more than one session is live.
    lone_blocks: the same while one session is live; more than the number of stages keeps all of them busy.
    queued_blocks: requests of one session that wait in the gateway; a stream with more is not read until there is room.
    answer_s: seconds that Triton may take for an answer.
    share_avatars: callers without a key reuse one another's avatars, and so can tell by time which are known.
    known_avatar_s: seconds for which the avatar of a caller is remembered after its last use.
    """

    max_sessions: int
    idle_s: float
    pipe_blocks: int
    lone_blocks: int
    queued_blocks: int = 8
    answer_s: float = 60.0
    known_avatars: int = 16
    known_avatar_s: float = 3600.0
    share_avatars: bool = False
    sessions_per_key: int | None = None
    starts_per_minute: int | None = None
    session_s: float | None = None
    streams: int = 256


@dataclass(frozen=True)
class GatewaySettings:
    """Where the gateway listens, where Triton is, and what it may do. Ports are TCP ports on `address`.

    triton: a gRPC target. triton_metrics: Triton's Unix socket for metrics.
    control: the folder that the stages look into (`control`).
    shared_memory: how the names of regions in /dev/shm for frames begin.
    """

    triton: str
    triton_metrics: Path
    control: Path
    shared_memory: str
    address: str
    grpc_port: int
    http_port: int
    metrics_port: int
    served: Served
    height: int
    width: int
    speakers: int
    limits: Limits
    api_key_file: Path | None = None
    admin_key_file: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    label_font: Path | None = None
    label: str | None = None
    operator: int | None = None
    sign_certificate: Path | None = None
    sign_key: Path | None = None
    log_format: str = "plain"
    log_hashes: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Self:
        values: dict[str, Any] = json.loads(text)
        values["served"] = Served(**values["served"])
        values["limits"] = Limits(**values["limits"])
        for name, value in values.items():
            if name == "control" or name.startswith(("tls_", "triton_", "sign_")) or name.endswith(("_file", "_font")):
                values[name] = None if value is None else Path(value)
        return cls(**values)


def triton_target(scratch: Path) -> str:
    """The address of Triton's gRPC in a server's folder. Triton takes `unix:PATH` as a host and appends `:PORT`."""
    return f"unix:{scratch}/grpc:1"


def metrics_socket(scratch: Path) -> Path:
    """Triton's socket for metrics."""
    return scratch / "metrics"


def control_folder(scratch: Path) -> Path:
    """What the supervisor, the gateway and the stages tell one another."""
    return scratch / "control"
