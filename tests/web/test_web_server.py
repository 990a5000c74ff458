"""The web server without an avatar's server, or where that does not matter: who is let in, and what pages get."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from websockets.exceptions import InvalidStatus

from live_avatar.assets import PORTRAITS
from live_avatar.serving.server import TritonServer
from live_avatar_client.errors import InvalidInput
from live_avatar_client.web.options import TextToSpeech, WebOptions
from live_avatar_client.web.protocol import VERSION
from perf.page import page_of
from tests.cli.support import tone
from tests.support.certificates import CertificateFolder
from tests.support.repository import ROOT
from tests.web.support import START, talking, visiting

NOWHERE = "127.0.0.1:1"
SERVER_KEY = "the-key-of-the-avatars-server"
VISITOR_KEY = "the-key-of-every-visitor"
FILES = sorted(path.name for path in (ROOT / "client/live_avatar_client/web/static").iterdir())


def get(address: str, context: ssl.SSLContext | None = None) -> tuple[int, dict[str, str], bytes]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(address, timeout=30) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


@pytest.fixture(scope="module")
def lonely() -> Iterator[str]:
    """A page whose avatar's server is not there."""
    with page_of(WebOptions(NOWHERE, api_key=SERVER_KEY, port=0, portraits=PORTRAITS)) as address:
        yield address


async def first_error(page: str, fields: dict[str, object] = START, **options: object):
    async with visiting(page, **options) as talker:
        await talker.send(**fields)
        return await talker.error()


def test_every_file_of_the_page_is_served_with_the_security_headers(lonely: str):
    names = ["", *(name for name in FILES if name != "index.html"), *(f"portraits/{name}" for name in PORTRAITS)]
    for name in [*names, "settings.json", "nothing-here"]:
        status, headers, body = get(f"{lonely}/{name}")
        assert status == (404 if name == "nothing-here" else 200), name
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert SERVER_KEY.encode() not in body
        assert "server" not in headers


def test_the_page_has_no_inline_code_and_needs_nothing_from_elsewhere(lonely: str):
    page = get(f"{lonely}/")[2].decode()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=", page)
    used = set(re.findall(r'(?:src|href)="([^"]+)"', page))
    for name in FILES:
        if name.endswith(".js"):
            source = get(f"{lonely}/{name}")[2].decode()
            used |= {target.removeprefix("./") for target in re.findall(r'(?:from|addModule\() ?"([^"]+)"', source)}
            assert "innerHTML" not in source, name
            assert not re.search(r"https?://", source), name
    assert used == set(FILES) - {"index.html"}


def test_the_settings_tell_what_a_page_must_know(lonely: str):
    assert json.loads(get(f"{lonely}/settings.json")[2]) == {
        "version": VERSION,
        "portraits": list(PORTRAITS),
        "label": "AI-generated",
        "needs_key": False,
        "max_text_chars": 1000,
        "max_picture_bytes": 4 * 1024 * 1024,
        "max_recording_s": 300,
    }


def test_a_page_without_its_server_says_so(lonely: str):
    error = asyncio.run(first_error(lonely))
    assert (error["code"], error["ends"]) == ("no_server", True)
    assert f"no server answered at {NOWHERE} within 10 s" in error["message"]
    assert SERVER_KEY not in error["message"]


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "http://evil.example:{port}", "https://127.0.0.1:{port}", "null"]
)
def test_pages_of_other_origins_are_refused(lonely: str, origin: str):
    port = lonely.rpartition(":")[2]
    with pytest.raises(InvalidStatus, match="403"):
        asyncio.run(first_error(lonely, origin=origin.format(port=port)))


def test_a_name_that_somebody_else_leads_to_this_machine_is_refused(lonely: str):
    """DNS rebinding: origin and host agree, but the page is not ours."""
    port = lonely.rpartition(":")[2]
    host = f"evil.example:{port}"

    async def visit():
        async with visiting(f"http://{host}", origin=f"http://{host}", host="127.0.0.1", port=int(port)):
            pass

    with pytest.raises(InvalidStatus, match="403"):
        asyncio.run(visit())


def test_the_own_page_may_connect(lonely: str):
    assert asyncio.run(first_error(lonely, origin=lonely))["code"] == "no_server"


def test_beyond_this_machine_a_page_has_tls_and_asks_for_the_key(tmp_path: Path):
    certificates = CertificateFolder(tmp_path)
    options = WebOptions(
        NOWHERE,
        port=0,
        host="0.0.0.0",
        certificate=certificates.access.tls_certificate,
        certificate_key=certificates.access.tls_key,
        visitor_key=VISITOR_KEY,
        portraits=PORTRAITS,
    )
    trusted = ssl.create_default_context(cadata=certificates.authority.cert_pem.bytes().decode())
    with page_of(options) as address:
        assert re.fullmatch(rf"https://0\.0\.0\.0:\d+/#key={VISITOR_KEY}", address)
        page = address.partition("/#")[0].replace("0.0.0.0", "localhost")
        status, _, settings = get(f"{page}/settings.json", trusted)
        assert status == 200
        assert json.loads(settings)["needs_key"]
        assert VISITOR_KEY.encode() not in settings
        for key, code, words in (("", "key", "the key is missing"), ("x", "key", "the key is wrong")):
            error = asyncio.run(first_error(page, {**START, "key": key}, ssl=trusted))
            assert (error["code"], error["ends"]) == (code, True)
            assert words in error["message"]
        error = asyncio.run(first_error(page, {**START, "key": VISITOR_KEY}, ssl=trusted, origin=page))
        assert (error["code"], error["message"]) == (
            "no_server",
            "the avatar's server does not answer; try again in a while",
        )
        with pytest.raises(InvalidStatus, match="403"):
            asyncio.run(first_error(page, ssl=trusted, origin=page.replace("https", "http")))


CERTIFICATE = {"certificate": "c.pem", "certificate_key": "k.pem"}
REFUSED = {
    "without TLS": ({"host": "0.0.0.0"}, "would listen on 0.0.0.0 without TLS, and browsers give the microphone"),
    "without a key": (
        {"host": "0.0.0.0", **CERTIFICATE},
        "everybody who reaches 0.0.0.0 could use the avatar",
    ),
    "proxy without a key": ({"origins": ("https://a.example",)}, "everybody who reaches https://a.example could use"),
    "half a certificate": ({"certificate": "c.pem"}, "a certificate without a key, or a key without one; pass both"),
    "short key": ({"visitor_key": "short"}, "the visitors' key has 5 characters; pass at least 16"),
    "plain origin": ({"origins": ("http://a.example",)}, "the origin 'http://a.example' is not https://name"),
    "long origin": ({"origins": ("https://a.example/x",)}, "the origin 'https://a.example/x' is not https://name"),
    "no sessions": ({"sessions_per_address": 0}, "sessions_per_address is 0; pass at least 1"),
}


@pytest.mark.parametrize(("options", "sentence"), REFUSED.values(), ids=REFUSED)
def test_options_that_protect_nobody_are_refused(options: dict, sentence: str):
    with pytest.raises(InvalidInput, match=re.escape(sentence)):
        WebOptions(NOWHERE, **options)


def test_keys_are_not_shown():
    options = WebOptions(NOWHERE, api_key=SERVER_KEY, visitor_key=VISITOR_KEY)
    assert "the-key" not in repr(options)


def test_a_certificate_that_cannot_be_used_is_a_sentence(tmp_path: Path):
    (tmp_path / "c.pem").write_text("no certificate")
    options = WebOptions(NOWHERE, certificate=tmp_path / "c.pem", certificate_key=tmp_path / "c.pem")
    with pytest.raises(InvalidInput, match=r"the certificate '.*c\.pem' and its key cannot be used: .*; pass a PEM"):
        options.ssl_context()


@contextmanager
def speech_endpoint(sound: bytes, asked: list[tuple[str | None, dict]], status: int = 200) -> Iterator[str]:
    """A server of `/v1/audio/speech` that sends the sound in odd pieces."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.headers["Authorization"], body))
            self.send_response(status)
            self.end_headers()
            for start in range(0, len(sound), 4_001):
                self.wfile.write(sound[start : start + 4_001])

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as endpoint:
        thread = threading.Thread(target=endpoint.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{endpoint.server_port}/v1/audio/speech"
        finally:
            endpoint.shutdown()
            thread.join()


def test_an_endpoint_like_openais_speaks_the_text(server: TritonServer):
    sound = (tone(1.0, 24_000) * 20_000).astype(np.int16)
    asked: list[tuple[str | None, dict]] = []

    async def visit(page: str):
        async with talking(page) as talker:
            await talker.send(type="speech.text", text="Hello", turn=0)
            return await talker.speech(16_000)

    with speech_endpoint(sound.astype("<i2").tobytes(), asked) as url:
        voice = TextToSpeech(url, "a-model", "a-voice", "a-secret")
        with page_of(WebOptions(server.options.url, port=0, portraits=PORTRAITS, text_to_speech=voice)) as page:
            said = asyncio.run(visit(page))
    body = {"model": "a-model", "voice": "a-voice", "input": "Hello", "response_format": "pcm"}
    assert asked == [("Bearer a-secret", body)]
    expected, begin = tone(1.0, 16_000) * 20_000, int(np.flatnonzero(np.abs(said) > 100)[0])
    errors = [np.abs(said[begin - k :][200:15_800] - expected[200:15_800]).max() for k in range(min(begin, 50) + 1)]
    assert min(errors) < 20


def test_an_endpoint_that_fails_is_told_and_the_conversation_goes_on(server: TritonServer):
    async def visit(page: str):
        async with talking(page) as talker:
            await talker.send(type="speech.text", text="Hello", turn=0)
            return await talker.error()

    with speech_endpoint(b"", [], 500) as url:
        for address, words in ((url, "the voice's server answered 500"), ("http://127.0.0.1:1/", "does not answer")):
            options = WebOptions(
                server.options.url,
                port=0,
                portraits=PORTRAITS,
                text_to_speech=TextToSpeech(address, api_key="a-secret"),
            )
            with page_of(options) as page:
                error = asyncio.run(visit(page))
            assert not error["ends"]
            assert words in error["message"]
