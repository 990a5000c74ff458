"""Who may do what: the options, and a real server that is asked by those who may and those who may not."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import pytest
import trustme
from tritonclient.grpc import service_pb2, service_pb2_grpc

from live_avatar.arrays import Array
from live_avatar.cli.doctor import exit_code
from live_avatar.errors import ServerError
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.serving.access import Access, access_warnings, check_access, is_loopback, read_key
from live_avatar.serving.server import serving
from live_avatar.serving.server_options import ServerOptions
from live_avatar.serving.supervisor import WITHOUT_PROXY
from live_avatar_client import AvatarSession, ConnectFailed, SessionRefused
from live_avatar_client.base import TLS, call_metadata, open_channel
from live_avatar_client.protocol import API_KEY_HEADER
from live_avatar_client.status import KeyState, server_status
from tests.cli.support import run, wait_until
from tests.conftest import noise_speech

API_KEY = "an-api-key-of-callers"
ADMIN_KEY = "an-admin-key-of-operators"
ADMIN_HEADER = "triton-grpc-protocol-admin-key"


@dataclass(frozen=True)
class Files:
    """Keys, and certificates of 127.0.0.1, of a client and of a stranger whose authority nobody knows."""

    folder: Path

    @property
    def access(self) -> Access:
        """All there is."""
        return Access(
            self.folder / "api.key",
            self.folder / "admin.key",
            self.folder / "server.pem",
            self.folder / "server.key",
            self.folder / "ca.pem",
        )

    def tls(self, name: str | None, authority: str = "ca") -> TLS:
        """A client's side, with the certificate of `name`."""
        roots = self.folder / f"{authority}.pem"
        return TLS(roots) if name is None else TLS(roots, self.folder / f"{name}.pem", self.folder / f"{name}.key")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("access")
    (folder / "api.key").write_text(f"{API_KEY}\n")
    (folder / "admin.key").write_text(ADMIN_KEY)
    for authority, names in {"ca": ("server", "client"), "other": ("stranger",)}.items():
        ca = trustme.CA()
        ca.cert_pem.write_to_path(folder / f"{authority}.pem")
        for name in names:
            issued = ca.issue_cert("127.0.0.1" if name == "server" else f"{name}.example")
            issued.private_key_pem.write_to_path(folder / f"{name}.key")
            issued.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
    return Files(folder)


# The options


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.9.1", "localhost", "::1"])
def test_for_this_machine_alone_nothing_is_open_to_others(address: str):
    assert is_loopback(address)
    assert access_warnings(Access(), address) == []


def test_beyond_this_machine_the_missing_key_and_the_missing_tls_are_told(files: Files):
    assert not is_loopback("0.0.0.0")
    no_key, no_tls = access_warnings(Access(), "0.0.0.0")
    for words in ("0.0.0.0", "without an API key", "everybody", "--api-key-file", "--address 127.0.0.1"):
        assert words in no_key
    for words in ("0.0.0.0", "without TLS", "--tls-certificate", "--tls-key", "--address 127.0.0.1"):
        assert words in no_tls
    assert access_warnings(replace(files.access, tls_certificate=None, tls_key=None), "0.0.0.0") == [no_tls]
    assert access_warnings(files.access, "0.0.0.0") == []


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
@pytest.mark.parametrize("key", ["a" * 16, "z" * 256, "!#$%&'()*+-./;<=>?@[\\]^_`{|}~"])
def test_a_key_is_a_line_of_printable_characters(tmp_path: Path, key: str, end: str):
    path = tmp_path / "key"
    path.write_text(key + end, newline="")
    assert read_key(path) == key


@pytest.mark.parametrize("field", ["tls_certificate", "tls_key", "tls_client_ca"])
def test_a_file_that_cannot_be_read_is_named(files: Files, tmp_path: Path, field: str):
    for path, reason in ((tmp_path / "nowhere", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ServerError, match=rf"{path}: the .* cannot be read \({reason}.*give a file"):
            check_access(replace(files.access, **{field: path}))


def test_callers_and_operators_cannot_have_one_key(artifacts: Artifacts, files: Files):
    access = Access(api_key_file=files.folder / "api.key", admin_key_file=files.folder / "api.key")
    options = ServerOptions(artifacts.folder, access=access).on_free_ports()
    with (
        pytest.raises(ServerError, match=r"the same key.*put another key into one of them") as refused,
        serving(options),
    ):
        pass
    assert API_KEY not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"tls_certificate": "server.pem"}, "--tls-key"),
        ({"tls_key": "server.key"}, "--tls-certificate"),
        ({"tls_client_ca": "ca.pem"}, "--tls-certificate and --tls-key"),
    ],
)
def test_half_of_tls_is_refused(files: Files, given: dict[str, str], missing: str):
    paths = {field: files.folder / name for field, name in given.items()}
    with pytest.raises(ServerError, match=f"^--{next(iter(given)).replace('_', '-')} .*; give {missing} too"):
        check_access(Access(**paths))


@pytest.mark.parametrize(
    ("field", "name", "fault"),
    [
        ("tls_key", "client.key", "key values mismatch"),
        ("tls_key", "server.pem", "cannot be read as PEM"),
        ("tls_certificate", "server.key", "cannot be read as PEM"),
        ("tls_client_ca", "server.key", "no certificate"),
        ("tls_client_ca", "api.key", "no certificate"),
    ],
)
def test_certificates_that_cannot_be_used_are_refused(files: Files, field: str, name: str, fault: str):
    with pytest.raises(ServerError, match=rf"{files.folder / name}.*{fault}.*; give .*PEM file"):
        check_access(replace(files.access, **{field: files.folder / name}))


# A server with everything


@pytest.fixture(scope="module")
def secured(artifacts: Artifacts, files: Files) -> Iterator[ServerOptions]:
    """TLS for both sides, an API key and an admin key."""
    options = ServerOptions(artifacts.folder, access=files.access).on_free_ports()
    with serving(options):
        yield options


@pytest.fixture
def secured_url(secured: ServerOptions) -> str:
    return f"127.0.0.1:{secured.grpc_port}"


def streamed(url: str, speech: Array, picture: bytes, api_key: str | None, tls: TLS | None) -> int:
    """Frames that a session gets."""
    with AvatarSession(url, image=picture, api_key=api_key, tls=tls) as session:
        return sum(len(block.frames) for block in session.stream([speech]))


def test_with_certificates_and_key_frames_come(secured_url: str, files: Files, picture: bytes):
    assert streamed(secured_url, noise_speech(0.6), picture, API_KEY, files.tls("client")) == 15


def test_the_command_line_takes_certificates_and_key(secured_url: str, files: Files):
    keys = ("--api-key-file", files.folder / "api.key")
    certificates = ("--tls-ca", "ca.pem", "--tls-certificate", "client.pem", "--tls-key", "client.key")
    paths = [name if name.startswith("--") else files.folder / name for name in certificates]
    told = run("doctor", secured_url, *keys, *paths)
    assert told.returncode == 0, told.stderr
    assert told.stdout.splitlines()[-2:] == ["TLS         yes", "API key     accepted"]
    told = run("doctor", secured_url, *paths)
    assert told.returncode == 1, told.stderr
    assert told.stdout.splitlines()[-1].startswith("API key     missing")


def test_doctor_sees_tls_and_an_accepted_key(secured_url: str, files: Files):
    status = server_status(secured_url, api_key=API_KEY, tls=files.tls("client"))
    assert (status.live, status.ready, status.tls, status.key) == (True, True, True, KeyState.ACCEPTED)
    assert (status.preset, status.profile, status.draining) == ("tiny", "cpu", False)
    assert status.free_sessions is not None
    assert status.free_sessions >= 1


@pytest.mark.parametrize(
    ("api_key", "state", "words"),
    [
        (None, KeyState.MISSING, "asks for an API key, and none was given; pass the server's key"),
        ("another-key-of-callers", KeyState.REFUSED, "does not know the API key; pass the server's key"),
    ],
)
def test_without_the_key_nothing_is_inferred(
    secured_url: str, files: Files, picture: bytes, api_key: str | None, state: KeyState, words: str
):
    with pytest.raises(SessionRefused, match=words) as refused:
        streamed(secured_url, noise_speech(0.6), picture, api_key, files.tls("client"))
    assert str(api_key) not in str(refused.value)
    status = server_status(secured_url, api_key=api_key, tls=files.tls("client"))
    assert (status.live, status.key, status.preset, status.free_sessions) == (True, state, None, None)


@pytest.mark.parametrize("how", ["plain text", "no certificate", "a stranger's certificate", "another authority"])
def test_without_the_certificates_nobody_answers(secured_url: str, files: Files, picture: bytes, how: str):
    tls = {
        "plain text": None,
        "no certificate": files.tls(None),
        "a stranger's certificate": files.tls("stranger"),
        "another authority": files.tls("client", authority="other"),
    }[how]
    for connect in (
        lambda: streamed(secured_url, noise_speech(0.6), picture, API_KEY, tls),
        lambda: server_status(secured_url, api_key=API_KEY, tls=tls),
    ):
        with pytest.raises(ConnectFailed, match=rf"{secured_url}.*(TLS|tls)"):
            connect()


Calls = dict[str, object]
OPERATOR_CALLS: Calls = {
    "ModelStatistics": service_pb2.ModelStatisticsRequest(),
    "ModelConfig": service_pb2.ModelConfigRequest(name="live_avatar"),
}
CLOSED_CALLS: Calls = {
    "TraceSetting": service_pb2.TraceSettingRequest(),
    "LogSettings": service_pb2.LogSettingsRequest(),
    "SystemSharedMemoryStatus": service_pb2.SystemSharedMemoryStatusRequest(),
    "SystemSharedMemoryRegister": service_pb2.SystemSharedMemoryRegisterRequest(name="x", key="/x", byte_size=1),
    "CudaSharedMemoryStatus": service_pb2.CudaSharedMemoryStatusRequest(),
    "RepositoryIndex": service_pb2.RepositoryIndexRequest(),
    "RepositoryModelLoad": service_pb2.RepositoryModelLoadRequest(model_name="vae_decoder"),
    "RepositoryModelUnload": service_pb2.RepositoryModelUnloadRequest(model_name="live_avatar"),
}
"""They do not exist at the gateway."""


def codes(channel: grpc.Channel, calls: Calls, metadata: tuple[tuple[str, str], ...]) -> set[grpc.StatusCode]:
    """How the calls end."""
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    found = set()
    for name, request in calls.items():
        try:
            getattr(stub, name)(request, timeout=10.0, metadata=metadata)
            found.add(grpc.StatusCode.OK)
        except grpc.RpcError as error:
            found.add(error.code())
    return found


@pytest.mark.parametrize("api_key", [None, API_KEY, ADMIN_KEY])
def test_callers_reach_nothing_of_the_operators(secured_url: str, files: Files, api_key: str | None):
    with open_channel(secured_url, files.tls("client")) as channel:
        assert codes(channel, OPERATOR_CALLS, call_metadata(api_key)) == {grpc.StatusCode.UNAUTHENTICATED}
        assert codes(channel, CLOSED_CALLS, call_metadata(api_key)) == {grpc.StatusCode.UNIMPLEMENTED}


def test_operators_reach_what_is_theirs_and_nothing_of_triton(secured_url: str, files: Files):
    with open_channel(secured_url, files.tls("client")) as channel:
        metadata = ((ADMIN_HEADER, ADMIN_KEY), (API_KEY_HEADER, API_KEY))
        assert codes(channel, OPERATOR_CALLS, metadata) == {grpc.StatusCode.OK}
        assert codes(channel, CLOSED_CALLS, metadata) == {grpc.StatusCode.UNIMPLEMENTED}


def test_a_key_may_come_as_a_bearer_token(secured_url: str, files: Files):
    request = service_pb2.ModelInferRequest(model_name="status")
    with open_channel(secured_url, files.tls("client")) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        answer = stub.ModelInfer(request, timeout=10.0, metadata=(("authorization", f"Bearer {API_KEY}"),))
        assert answer.model_name == "status"
        with pytest.raises(grpc.RpcError) as refused:
            stub.ModelInfer(request, timeout=10.0, metadata=(("authorization", f"Basic {API_KEY}"),))
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


# HTTP has no TLS

OPEN = ("v2/health/live", "v2/health/ready", "v2", "v2/models/live_avatar", "v2/models/live_avatar/ready")
CLOSED: dict[str, bytes | None] = {
    "v2/models/live_avatar/infer": b"{}",
    "v2/models/live_avatar/generate": b"{}",
    "v2/models/dit_step_1": None,
    "v2/repository/index": b"{}",
    "v2/repository/models/live_avatar/unload": b"{}",
    "v2/models/stats": None,
    "v2/models/live_avatar/config": None,
    "v2/trace/setting": None,
    "v2/logging": None,
    "v2/systemsharedmemory/status": None,
    "v2/cudasharedmemory/status": None,
}


def http_status(options: ServerOptions, path: str, body: bytes | None = None, **headers: str) -> int:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(f"http://127.0.0.1:{options.http_port}/{path}", data=body, headers=named)
    try:
        with WITHOUT_PROXY.open(request, timeout=10.0) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def test_http_says_how_the_server_is_and_no_more(secured: ServerOptions):
    assert {path: http_status(secured, path) for path in OPEN} == dict.fromkeys(OPEN, 200)
    for keys in ({}, {"api_key": API_KEY, "admin_key": ADMIN_KEY}):
        assert {path: http_status(secured, path, body, **keys) for path, body in CLOSED.items()} == dict.fromkeys(
            CLOSED, 404
        )


# A server beyond loopback with nothing


@pytest.fixture(scope="module")
def exposed(artifacts: Artifacts) -> Iterator[ServerOptions]:
    options = ServerOptions(artifacts.folder, address="0.0.0.0", max_sessions=1).on_free_ports()
    with serving(options):
        yield options


def test_beyond_loopback_triton_is_out_of_reach(exposed: ServerOptions):
    url = f"127.0.0.1:{exposed.grpc_port}"
    with open_channel(url, None) as channel:
        assert codes(channel, CLOSED_CALLS, ((ADMIN_HEADER, ADMIN_KEY),)) == {grpc.StatusCode.UNIMPLEMENTED}
        assert codes(channel, OPERATOR_CALLS, ()) == {grpc.StatusCode.OK}
    assert {path: http_status(exposed, path, body) for path, body in CLOSED.items()} == dict.fromkeys(CLOSED, 404)


@pytest.mark.parametrize("api_key", [None, API_KEY])
def test_a_server_without_a_key_takes_any(exposed: ServerOptions, api_key: str | None):
    status = server_status(f"127.0.0.1:{exposed.grpc_port}", api_key=api_key)
    assert (status.ready, status.tls, status.key, status.preset) == (True, False, KeyState.NOT_NEEDED, "tiny")


def test_a_full_server_has_nothing_free_until_a_session_ends(exposed: ServerOptions, picture: bytes):
    url = f"127.0.0.1:{exposed.grpc_port}"
    wait_until(lambda: server_status(url).free_sessions == 1)
    with AvatarSession(url, image=picture):
        wait_until(lambda: server_status(url).free_sessions == 0)
        status = server_status(url)
        assert (status.ready, status.max_sessions, status.live_sessions) == (True, 1, 1)
        assert exit_code(status) == 1
    wait_until(lambda: server_status(url).free_sessions == 1)
    assert exit_code(server_status(url)) == 0


def test_tls_against_plain_text_is_refused(exposed: ServerOptions, files: Files):
    with pytest.raises(ConnectFailed, match="TLS"):
        server_status(f"127.0.0.1:{exposed.grpc_port}", tls=files.tls(None))


def test_serve_refuses_a_key_in_one_sentence(artifacts: Artifacts, tmp_path: Path):
    options = ServerOptions(artifacts.folder).on_free_ports()
    ports = ("--grpc-port", options.grpc_port, "--http-port", options.http_port, "--metrics-port", options.metrics_port)
    (tmp_path / "short.key").write_text("secret")
    keys = ("--api-key-file", tmp_path / "short.key")
    ended = run("serve", "--artifacts", artifacts.folder, "--address", "0.0.0.0", *ports, *keys)
    assert (ended.returncode, ended.stdout) == (2, "")
    [error] = ended.stderr.splitlines()
    assert error.startswith(f"Error: {tmp_path / 'short.key'} holds a key of 6 characters; ")
