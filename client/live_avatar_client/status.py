"""Reads a server's status: liveness, readiness, model, free sessions, and whether it accepts the API key.

`live-avatar doctor` prints it; a load balancer may use it to choose a server.
"""

import statistics
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from . import base, wire
from .errors import ServerIncompatible
from .protocol import STATUS, STATUS_MODEL, STATUS_QUERY
from .text import printable
from .tls import TLS

ROUND_TRIPS: Final = 5

_FIELDS: Final = {
    "version": str,
    "preset": str,
    "artifacts": str,
    "profile": str,
    "max_sessions": int,
    "live_sessions": int,
    "draining": bool,
}
_QUERY: Final = np.array([b"status"], np.object_)


class KeyState(StrEnum):
    """The server's verdict on the API key."""

    NOT_NEEDED = "not needed"
    """The server serves anyone."""
    ACCEPTED = "accepted"
    MISSING = "missing"
    """The server requires a key and got none."""
    REFUSED = "refused"
    """The server requires another key."""


@dataclass(frozen=True)
class ServerStatus:
    """Status of a server. The fields of the model `status` are None if it cannot be called, as without a key."""

    url: str
    live: bool
    ready: bool
    """Whether it reports that it takes new sessions; false while it drains or a stage is down."""
    round_trip_s: float
    """Median of a few calls, not counting the connection."""
    tls: bool
    key: KeyState
    version: str | None = None
    preset: str | None = None
    artifacts: str | None = None
    """Fingerprint of the artifacts."""
    profile: str | None = None
    max_sessions: int | None = None
    live_sessions: int | None = None
    draining: bool | None = None

    @property
    def free_sessions(self) -> int | None:
        """Number of sessions that can be opened now."""
        if self.max_sessions is None or self.live_sessions is None:
            return None
        return 0 if self.draining else max(self.max_sessions - self.live_sessions, 0)


def server_status(
    url: str, *, api_key: str | None = None, tls: TLS | None = None, timeout_s: float = 5.0
) -> ServerStatus:
    """Ask the server at `url` for its status; `url`, `api_key` and `tls` are as a session's.

    Args:
        url: `host:port` of the server's gRPC port, with or without `grpc://` or `grpcs://` in front.
        api_key: the server's API key, if it requires one.
        tls: the certificates of a TLS connection; without it `grpcs://` trusts the public authorities.
        timeout_s: the longest time for each of at most nine answers.

    Raises ConnectFailed if no server answers, ServerIncompatible if the server is not a Live Avatar server, and
    InvalidInput for a bad address or certificate file.
    """
    with base.open_channel(url, tls) as channel:
        base.warn_of_plain_key(url, api_key, tls)
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            live = stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=timeout_s).live
            round_trip_s = _round_trip_s(stub, timeout_s)
            ready = stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=timeout_s).ready
        except grpc.RpcError as error:
            raise base.connect_error(url, error, timeout_s, tls) from error
        key, served = _ask(stub, url, api_key, timeout_s)
    return ServerStatus(url, live, ready, round_trip_s, base.tls_of(url, tls) is not None, key, **served)


def _round_trip_s(stub: service_pb2_grpc.GRPCInferenceServiceStub, timeout_s: float) -> float:
    times_s = []
    for _ in range(ROUND_TRIPS):
        begun_s = time.perf_counter()
        stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=timeout_s)
        times_s.append(time.perf_counter() - begun_s)
    return statistics.median(times_s)


def _ask(
    stub: service_pb2_grpc.GRPCInferenceServiceStub, url: str, api_key: str | None, timeout_s: float
) -> tuple[KeyState, dict[str, Any]]:
    """Return the server's verdict on the key, and the fields of the model `status`."""
    # First without the key: a server that requires no key accepts any.
    served = _served(stub, url, None, timeout_s)
    if served is not None:
        return KeyState.NOT_NEEDED, served
    if api_key is None:
        return KeyState.MISSING, {}
    served = _served(stub, url, api_key, timeout_s)
    return (KeyState.REFUSED, {}) if served is None else (KeyState.ACCEPTED, served)


def _served(
    stub: service_pb2_grpc.GRPCInferenceServiceStub, url: str, api_key: str | None, timeout_s: float
) -> dict[str, Any] | None:
    """Return the fields of the model `status`, {} if it cannot answer now, None if the server requires another key."""
    request = service_pb2.ModelInferRequest(model_name=STATUS_MODEL)
    wire.put_tensor(request.inputs, request.raw_input_contents, STATUS_QUERY, _QUERY)
    try:
        answer = stub.ModelInfer(request, timeout=timeout_s, metadata=base.call_metadata(api_key))
    except grpc.RpcError as error:
        if base.wants_key(error):
            return None
        if error.code() is grpc.StatusCode.NOT_FOUND:
            raise ServerIncompatible(
                f"the server at {url} has no model {STATUS_MODEL!r}; pass the address of a Live Avatar server of "
                "this client's version"
            ) from error
        return {}
    return _checked(url, answer)


def _checked(url: str, answer: wire.Message) -> dict[str, Any]:
    rows = wire.get_tensor(answer.outputs, answer.raw_output_contents, STATUS)
    status = {} if rows is None else wire.decode_json(STATUS, rows)
    for name, kind in _FIELDS.items():
        if type(status.get(name)) is not kind:  # a bool is an int too
            raise ServerIncompatible(
                f"the model {STATUS_MODEL!r} at {url} gives {printable(repr(status.get(name)))} as {name}, expected "
                f"{kind.__name__}; use a client and a server of the same version"
            )
    return {name: printable(value) if isinstance(value := status[name], str) else value for name in _FIELDS}
