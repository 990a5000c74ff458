"""What a client learns of a server's state, over real gRPC, from servers in every state."""

import json
import socket
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest
import trustme
from tritonclient.grpc import service_pb2, service_pb2_grpc

from live_avatar_client import ConnectFailed, InvalidInput, ServerIncompatible
from live_avatar_client.protocol import API_KEY_HEADER, STATUS, STATUS_MODEL, STATUS_QUERY
from live_avatar_client.status import KeyState, ServerStatus, server_status
from live_avatar_client.tls import TLS
from live_avatar_client.wire import get_tensor, put_tensor
from tests.support.status import SERVED

KEY = "the-key-of-the-server"


@dataclass(frozen=True)
class State:
    """What a server says. `row` is what its model `status` answers; None: no tensor."""

    ready: bool = True
    api_key: str | None = None
    row: bytes | None = json.dumps(SERVED).encode()
    failure: grpc.StatusCode | None = None


class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, state: State) -> None:
        self._state = state

    def ServerLive(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return service_pb2.ServerLiveResponse(live=True)

    def ServerReady(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return service_pb2.ServerReadyResponse(ready=self._state.ready)

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        state = self._state
        if state.api_key not in (None, dict(context.invocation_metadata()).get(API_KEY_HEADER)):
            context.abort(
                grpc.StatusCode.UNAVAILABLE, f"This protocol is restricted, expecting header '{API_KEY_HEADER}'"
            )
        query = get_tensor(request.inputs, request.raw_input_contents, STATUS_QUERY)
        assert (request.model_name, query) == (STATUS_MODEL, [b"status"])
        if state.failure is not None:
            context.abort(state.failure, "not now")
        answer = service_pb2.ModelInferResponse(model_name=STATUS_MODEL)
        if state.row is not None:
            put_tensor(answer.outputs, answer.raw_output_contents, STATUS, np.frombuffer(state.row, np.uint8))
        return answer


@contextmanager
def serving(state: State | None, credentials: grpc.ServerCredentials | None = None) -> Iterator[str]:
    """The address of a server in this state; None: one that knows no KServe."""
    with futures.ThreadPoolExecutor(2) as workers:
        server = grpc.server(workers)
        if state is not None:
            service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Servicer(state), server)
        if credentials is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


def test_a_ready_server_says_what_it_serves_and_how_much_is_free():
    with serving(State()) as url:
        status = server_status(url)
    assert 0 < status.round_trip_s < 60
    assert status == ServerStatus(
        url=url,
        live=True,
        ready=True,
        round_trip_s=status.round_trip_s,
        tls=False,
        key=KeyState.NOT_NEEDED,
        **SERVED,
    )
    assert status.free_sessions == 3


@pytest.mark.parametrize(
    ("wanted", "given", "key", "free"),
    [
        (None, None, KeyState.NOT_NEEDED, 3),
        (None, KEY, KeyState.NOT_NEEDED, 3),
        (KEY, KEY, KeyState.ACCEPTED, 3),
        (KEY, None, KeyState.MISSING, None),
        (KEY, "another-key-than-that", KeyState.REFUSED, None),
    ],
)
def test_the_state_of_the_key(wanted: str | None, given: str | None, key: KeyState, free: int | None):
    with serving(State(api_key=wanted)) as url:
        status = server_status(url, api_key=given)
    assert (status.live, status.ready, status.key, status.free_sessions) == (True, True, key, free)


@pytest.mark.parametrize(
    ("changes", "free"),
    [({"live_sessions": 4}, 0), ({"live_sessions": 0}, 4), ({"draining": True}, 0), ({"live_sessions": 5}, 0)],
)
def test_free_sessions(changes: dict[str, object], free: int):
    with serving(State(row=json.dumps(SERVED | changes).encode())) as url:
        assert server_status(url).free_sessions == free


def test_a_server_that_is_not_ready_still_says_what_it_serves():
    with serving(State(ready=False)) as url:
        status = server_status(url)
    assert (status.live, status.ready, status.preset, status.free_sessions) == (True, False, "tiny", 3)


@pytest.mark.parametrize("failure", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL])
def test_what_the_model_cannot_say_now_is_not_known(failure: grpc.StatusCode):
    with serving(State(failure=failure, api_key=KEY)) as url:
        status = server_status(url, api_key=KEY)
    assert (status.live, status.ready, status.key) == (True, True, KeyState.ACCEPTED)
    assert (status.preset, status.max_sessions, status.draining, status.free_sessions) == (None, None, None, None)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (None, "speaks gRPC but not KServe v2; pass the address"),
        (State(failure=grpc.StatusCode.NOT_FOUND), "has no model 'status'; pass the address"),
        (State(row=None), "None as version, expected str; use a client and a server of the same version"),
        (State(row=b"\xff{"), "STATUS is no JSON.*use a client and a server of the same version"),
        (State(row=b"[1]"), "STATUS is a JSON list, expected an object"),
        (State(row=json.dumps({**SERVED, "max_sessions": "4"}).encode()), "'4' as max_sessions, expected int"),
        (State(row=json.dumps({**SERVED, "draining": None}).encode()), "None as draining, expected bool"),
    ],
)
def test_another_kind_of_server_is_told(state: State | None, words: str):
    with serving(state) as url, pytest.raises(ServerIncompatible, match=words):
        server_status(url)


def test_fields_of_a_newer_server_are_no_trouble():
    with serving(State(row=json.dumps({**SERVED, "mood": "good"}).encode())) as url:
        assert server_status(url).preset == "tiny"


def test_nobody_there_is_told_at_once():
    with socket.socket() as unused:  # bound, and not listening
        unused.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{unused.getsockname()[1]}"
        begun_s = time.monotonic()
        with pytest.raises(ConnectFailed, match=f"no server answered at {url} .*check that it runs"):
            server_status(url, timeout_s=600)
    assert time.monotonic() - begun_s < 60


def test_a_server_that_never_answers_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConnectFailed, match=f"no server answered at {url} within 0.3 s"):
            server_status(url, timeout_s=0.3)


@pytest.mark.parametrize("url", ["localhost", "http://localhost:8001"])
def test_an_address_of_another_kind_is_refused(url: str):
    with pytest.raises(InvalidInput, match="host:port"):
        server_status(url)


def test_tls_is_seen_and_wanted(tmp_path: Any):
    ca, other = trustme.CA(), trustme.CA()
    for name, authority in {"ca": ca, "other": other}.items():
        authority.cert_pem.write_to_path(tmp_path / f"{name}.pem")
    issued = ca.issue_cert("127.0.0.1")
    pair = (issued.private_key_pem.bytes(), issued.cert_chain_pems[0].bytes())
    with serving(State(), grpc.ssl_server_credentials([pair])) as url:
        assert server_status(url, tls=TLS(tmp_path / "ca.pem")).tls
        for tls in (None, TLS(tmp_path / "other.pem"), TLS()):
            with pytest.raises(ConnectFailed, match="TLS"):
                server_status(url, tls=tls)
        with pytest.raises(ConnectFailed, match="the connection is TLS"):
            server_status(f"grpcs://{url}")
    with serving(State()) as url, pytest.raises(ConnectFailed, match="the connection is TLS"):
        server_status(url, tls=TLS(tmp_path / "ca.pem"))
