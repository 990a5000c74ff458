"""Servers that let in who they know: API keys, TLS, mutual TLS, and what a client that is not let in reads."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

from live_avatar_client import (
    TLS,
    AsyncAvatarSession,
    AvatarError,
    AvatarSession,
    AvatarWarning,
    ConnectFailed,
    InvalidInput,
    SessionRefused,
)
from live_avatar_client.address import is_loopback, parse_url
from live_avatar_client.base import call_metadata, tls_of
from live_avatar_client.status import server_status
from live_avatar_client.testing import SAMPLE_IMAGE, FakeAvatarServer, sample_speech

KEY = "the-key-of-the-server"

# So large that the server refuses it before it is written, when grpc's asyncio API forgets why.
LARGE_IMAGE = SAMPLE_IMAGE + bytes(2_000_000)


def frames_sync(url: str, **options: Any) -> int:
    with AvatarSession(url, **{"image": SAMPLE_IMAGE, **options}) as session:
        return sum(len(block) for block in session.stream([sample_speech(9000)]))


def frames_async(url: str, **options: Any) -> int:
    async def play() -> int:
        async with AsyncAvatarSession(url, **{"image": SAMPLE_IMAGE, **options}) as session:
            return sum([len(block) async for block in session.stream([sample_speech(9000)])])

    return asyncio.run(play())


both_ways = pytest.mark.parametrize("frames", [frames_sync, frames_async])


class Certificates:
    """Two authorities, and files of their certificates."""

    def __init__(self, folder: Path) -> None:
        authority, other = trustme.CA(), trustme.CA()
        self.roots, self.other_roots = folder / "roots.pem", folder / "other.pem"
        authority.cert_pem.write_to_path(str(self.roots))
        other.cert_pem.write_to_path(str(self.other_roots))
        server, client = authority.issue_cert("localhost"), authority.issue_cert("client.example")
        self.certificate, self.key = folder / "client.pem", folder / "client.key"
        client.cert_chain_pems[0].write_to_path(str(self.certificate))
        client.private_key_pem.write_to_path(str(self.key))
        pair = (server.private_key_pem.bytes(), server.cert_chain_pems[0].bytes())
        self.tls = grpc.ssl_server_credentials([pair])
        self.mutual_tls = grpc.ssl_server_credentials([pair], authority.cert_pem.bytes(), require_client_auth=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


def refusal(frames: Callable[..., int], url: str, kind: type[AvatarError], **options: Any) -> str:
    with pytest.raises(kind) as caught:
        frames(url, connect_timeout_s=60, **options)
    return str(caught.value)


@both_ways
def test_an_api_key(frames: Callable[..., int]) -> None:
    with FakeAvatarServer(api_key=KEY) as server:
        assert frames(server.url, api_key=KEY) == 15
        none = refusal(frames, server.url, SessionRefused, image=LARGE_IMAGE)
        wrong = refusal(frames, server.url, SessionRefused, image=LARGE_IMAGE, api_key="wr0ng")
    remedy = "pass the server's key as api_key"
    assert none == f"the server at {server.url} asks for an API key, and none was given; {remedy}"
    assert wrong == f"the server at {server.url} does not know the API key; {remedy}"
    assert len(server.sessions) == 1


@pytest.mark.parametrize("key", ["", "two words", "sécret", "line\n"])
def test_a_key_that_can_be_none_is_not_repeated(key: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        call_metadata(key)
    assert str(caught.value) == "api_key is empty, or has characters beyond visible ASCII; pass the server's key"
    with pytest.raises(InvalidInput, match="api_key is a int; pass a str"):
        AvatarSession("localhost:8001", image=SAMPLE_IMAGE, api_key=5)  # type: ignore[arg-type]


@both_ways
def test_tls(frames: Callable[..., int], certificates: Certificates) -> None:
    with FakeAvatarServer(credentials=certificates.tls) as server:
        url = f"grpcs://{server.url.replace('127.0.0.1', 'localhost')}"
        by_address = server.url
        assert frames(url, tls=TLS(certificates.roots)) == 15
        assert frames(by_address, tls=TLS(certificates.roots, server_name="localhost")) == 15
        unknown = [
            refusal(frames, url, ConnectFailed),
            refusal(frames, url, ConnectFailed, tls=TLS(certificates.other_roots)),
            refusal(frames, by_address, ConnectFailed, tls=TLS(certificates.roots)),
        ]
        plain = refusal(frames, by_address, ConnectFailed)
    for text in unknown:
        assert "the connection is TLS: check that the server's is too, that root_certificates has the auth" in text
    assert plain.endswith("; if it speaks TLS only, put grpcs:// in front of the address or pass tls")


@both_ways
def test_tls_to_a_server_of_plain_text(frames: Callable[..., int], certificates: Certificates) -> None:
    with FakeAvatarServer() as server:
        text = refusal(frames, server.url, ConnectFailed, tls=TLS(certificates.roots))
    assert "the connection is TLS: check that the server's is too" in text


@both_ways
def test_mutual_tls(frames: Callable[..., int], certificates: Certificates) -> None:
    roots = certificates.roots
    with FakeAvatarServer(credentials=certificates.mutual_tls) as server:
        tls = TLS(roots, certificates.certificate, certificates.key, server_name="localhost")
        assert frames(server.url, tls=tls) == 15
        text = refusal(frames, server.url, ConnectFailed, tls=TLS(roots, server_name="localhost"))
    assert "and that the server does not ask for a certificate of yours" in text


@pytest.mark.parametrize(
    ("tls", "message"),
    [
        (TLS("none.pem"), "the root_certificates 'none.pem' cannot be read: No such file or directory; pass the"),
        (TLS(certificate="a.pem"), "TLS has a certificate but no private_key; pass both, or neither"),
        (TLS(private_key="a.pem"), "TLS has a private_key but no certificate; pass both, or neither"),
    ],
)
def test_certificates_that_cannot_be_used(tls: TLS, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        frames_sync("localhost:8001", tls=tls)


def test_a_file_that_is_no_certificate(tmp_path: Path) -> None:
    path = tmp_path / "roots.der"
    path.write_bytes(SAMPLE_IMAGE)
    with pytest.raises(InvalidInput, match=r"roots.der' has no -----BEGIN line; pass the path of a PEM file"):
        TLS(path).credentials()


def test_the_scheme_says_whether_it_is_tls() -> None:
    roots = TLS("roots.pem")
    assert [parse_url(f"{scheme}here:1") for scheme in ("", "grpc://", "grpcs://")] == ["here:1"] * 3
    assert [tls_of(url, None) for url in ("here:1", "grpc://here:1", "grpcs://here:1")] == [None, None, TLS()]
    assert tls_of("grpcs://here:1", roots) is tls_of("here:1", roots) is roots


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("[::1]:8001", "[::1]:8001"),
        ("grpcs://[2001:db8::7]:443", "[2001:db8::7]:443"),
        ("my_host.example.:1", "my_host.example.:1"),
        ("bücher.example:80", "xn--bcher-kva.example:80"),
    ],
)
def test_addresses(url: str, address: str) -> None:
    assert parse_url(url) == address


@pytest.mark.parametrize(
    "url",
    [
        "::1:8001",
        "[::1]",
        "[::g]:8001",
        "[localhost]:8001",
        "unix:socket:1",
        "dns:here:1",
        "user@here:1",
        "he re:1",
        "here:1\n",
        " here:1",
        "here:\uff18\uff10\uff10\uff11",
        "here:008001",
        "here:0",
        "a..ü:1",
        "%6c:1",
    ],
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(
        InvalidInput, match="is not host:port; pass one such as 'localhost:8001', or '\\[::1\\]:8001' for"
    ):
        parse_url(url)
    with pytest.raises(InvalidInput, match="url is a NoneType; pass a str such as"):
        parse_url(None)  # type: ignore[arg-type]


def test_a_server_at_an_ipv6_address() -> None:
    class Ipv6(FakeAvatarServer):
        def _add_port(self, address: str) -> int:
            return super()._add_port("[::1]:0")

    with Ipv6() as server:
        assert frames_sync(f"[::1]:{server.url.rpartition(':')[2]}") == 15


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("LocalHost.", True),
        ("me.localhost", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("127.1", True),
        ("[::1]", True),
        ("[0:0:0:0:0:0:0:1]", True),
        ("[::ffff:127.0.0.1]", True),
        ("localhost.example", False),
        ("127.0.0.1.example", False),
        ("0.0.0.0", False),
        ("[::]", False),
        ("10.0.0.1", False),
        ("[::ffff:10.0.0.1]", False),
    ],
)
def test_what_is_this_machine(host: str, expected: bool) -> None:
    assert is_loopback(f"grpc://{host}:8001") is expected


@pytest.mark.parametrize("make", [AvatarSession, AsyncAvatarSession])
def test_a_key_in_plain_text_is_warned_of(make: Callable[..., object]) -> None:
    async def session(url: str, **options: Any) -> None:
        make(url, image=SAMPLE_IMAGE, **options)

    message = r"the API key goes to example.com:8001 as plain text, .*; use TLS: put grpcs:// in front of the address"
    with pytest.warns(AvatarWarning, match=message) as warned:
        asyncio.run(session("example.com:8001", api_key=KEY))
    assert [warning.filename for warning in warned] == [__file__]
    for options in ({"url": "grpcs://example.com:8001"}, {"tls": TLS()}, {"url": "127.0.0.1:1"}, {"api_key": None}):
        asyncio.run(session(**{"url": "example.com:8001", "api_key": KEY, **options}))


def test_a_key_in_plain_text_is_warned_of_when_asking_for_the_status() -> None:
    with pytest.warns(AvatarWarning, match="goes to 192.0.2.1:9 as plain text"), pytest.raises(ConnectFailed):
        server_status("192.0.2.1:9", api_key=KEY, timeout_s=0.1)
