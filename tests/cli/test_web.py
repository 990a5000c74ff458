"""The commands of the page: `say`, `web` and `talk`."""

from __future__ import annotations

import asyncio
import signal
import socket
from pathlib import Path

import av
import pytest

from live_avatar.graphs.artifacts import Artifacts
from live_avatar_client.espeak import Voice, speak
from tests.cli.support import Running, assert_refused, frames_of, invoke
from tests.web.support import talking

SECRET = "nobody may write this sentence down"


def test_say_writes_the_video_of_a_text(url: str, image: Path, tmp_path: Path):
    output = tmp_path / "o.mp4"
    result = invoke("say", "Hello.", "--url", url, "--image", image, "--output", output, "--voice", "en-us+f2")
    assert result.exit_code == 0, result.stderr
    frames = frames_of(len(speak("Hello.", Voice("en-us+f2")).speech))
    assert result.stdout == f"Wrote {output} ({frames} frames).\n"
    with av.open(str(output)) as video:
        assert "AI-generated" in video.metadata["comment"]
        assert sum(1 for _ in video.decode(video=0)) == frames


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["Hello.", "--voice", "nope"], "espeak-ng has no voice 'nope'; give a language"),
        ([" "], "the text to speak is ' '; give at least one word"),
    ],
)
def test_say_refuses_in_a_sentence(words: list[str], sentence: str, image: Path, tmp_path: Path):
    assert_refused(invoke("say", *words, "--image", image, "--output", tmp_path / "o.mp4"), sentence)
    assert list(tmp_path.iterdir()) == []


def test_web_refuses_in_a_sentence(image: Path, tmp_path: Path):
    key = tmp_path / "key"
    key.write_text("x" * 32)
    (tmp_path / "no.png").write_text("no picture")
    assert_refused(invoke("web", "--host", "0.0.0.0"), "would listen on 0.0.0.0 without TLS")
    assert_refused(invoke("web", "--origin", "https://a.example"), "pass a key for visitors, or listen on 127.0.0.1")
    assert_refused(invoke("web", "--certificate", key, "--certificate-key", key), "cannot be used", "pass a PEM file")
    assert_refused(invoke("web", "--portrait", tmp_path / "no.png"), "which is no PNG, JPEG or WebP file")
    assert_refused(invoke("web", "--url", "https://a:1"), "has the scheme 'https', but frames are streamed over gRPC")
    assert_refused(invoke("web", "--speech-url", "file:///etc/passwd"), "is not http:// or https://")
    assert_refused(invoke("web", "--speech-key-file", key), "--speech-key-file is for --speech-url; give both, or none")
    same, odd = tmp_path / "other" / image.name, tmp_path / "a{b}.png"
    same.parent.mkdir()
    for copy in (same, odd):
        copy.write_bytes(image.read_bytes())
    words = ("--portrait", image, "--portrait", same)
    assert_refused(invoke("web", *words), f"2 portraits have 1 names ({image.stem}); name each file differently")
    assert_refused(invoke("web", "--portrait", odd), "the portrait 'a{b}' cannot be part of an address")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_refused(invoke("web", "--port", port), f"cannot listen on 127.0.0.1 port {port}: Address already in use")


def test_web_keeps_nothing_that_a_visitor_says_and_ends_with_ctrl_c(url: str, tmp_path: Path, started: list[Running]):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    temporary = tmp_path / "t"
    running = Running(temporary, "web", "--url", url, "--port", port)
    started.append(running)
    running.await_line(f"Talk to the avatar at http://127.0.0.1:{port}/ (press Ctrl-C to stop).")

    async def visit() -> None:
        async with talking(f"http://127.0.0.1:{port}", prompt=SECRET) as talker:
            await talker.send(type="speech.text", text=SECRET, turn=0)
            await talker.speech(16_000)
            await talker.send(type="speech.interrupt", turn=SECRET)
            assert (await talker.error())["code"] == "protocol"

    asyncio.run(visit())
    assert [path for path in temporary.rglob("*") if path.is_file()] == []
    code, said = running.end(signal.SIGINT)
    assert code == 0
    assert SECRET not in said
    assert "Traceback" not in said


def test_talk_starts_everything_and_leaves_nothing(artifacts: Artifacts, tmp_path: Path, started: list[Running]):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    running = Running(tmp_path / "t", "talk", "--artifacts", artifacts.folder, "--port", port)
    started.append(running)
    running.await_line(f"Talk to the avatar at http://127.0.0.1:{port}/")

    async def visit() -> None:
        async with talking(f"http://127.0.0.1:{port}") as talker:
            await talker.block()

    asyncio.run(visit())
    code, said = running.end(signal.SIGTERM)
    assert code == 0, said
    assert running.left() == []
