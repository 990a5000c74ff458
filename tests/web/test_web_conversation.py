"""Conversations with the real server, over the WebSocket that a page uses."""

from __future__ import annotations

import asyncio
import io
import itertools
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from websockets.exceptions import ConnectionClosed

from live_avatar.assets import PORTRAITS
from live_avatar.serving.server import TritonServer
from live_avatar_client import AvatarSession, SessionRefused
from live_avatar_client.espeak import Voice, speak
from live_avatar_client.web import server as web_server
from live_avatar_client.web.options import WebOptions
from live_avatar_client.web.protocol import MAX_PICTURE_BYTES
from perf.page import page_of
from tests.conftest import noise_speech
from tests.web.support import PATIENCE_S, Shown, assert_said, talking, visiting

TEXT = "Hello. My name is Robin."
LONG_TEXT = "This is a long sentence, which I say without any hurry. " * 8


def test_an_idle_avatar_is_shown_before_anything_is_said(page: str):
    async def visit():
        async with talking(page, label="") as talker:
            return talker.ready, [await talker.block() for _ in range(3)]

    ready, blocks = asyncio.run(visit())
    assert (ready["version"], ready["rate_hz"], ready["fps"]) == (1, 16_000, 25)
    assert ready["provenance"]["seed"] == 0
    assert [block.first_frame for block in blocks] == [0, 4, 8]
    for block in blocks:
        assert not block.is_speech
        assert not block.sound.any()
        assert len(block.sound) == 640 * len(block.jpegs)
        assert block.frames().shape == (4, 96, 96, 3)


def test_the_label_is_on_the_picture_unless_it_is_refused(page: str):
    async def first_block(**fields):
        async with talking(page, **fields) as talker:
            return (await talker.block()).frames().astype(int)

    plain, labelled, own = (asyncio.run(first_block(**fields)) for fields in ({"label": ""}, {}, {"label": "Hi"}))
    assert np.abs(labelled - plain).max() > 80
    assert np.abs(own - labelled).max() > 80


def test_a_typed_text_is_said_sample_by_sample(page: str):
    expected = speak(TEXT, Voice("en-us")).speech

    async def visit():
        async with talking(page) as talker:
            await talker.send(type="speech.text", text=TEXT, turn=0)
            return await talker.speech(len(expected))

    assert_said(asyncio.run(visit()), expected)


def test_speech_of_a_microphone_comes_back_with_its_frames(page: str):
    speech = noise_speech(1.2)

    async def visit():
        async with talking(page) as talker:
            for start in range(0, len(speech), 640):
                await talker.speak(speech[start : start + 640])
                await asyncio.sleep(0.02)
            return await talker.speech(len(speech))

    assert_said(asyncio.run(visit()), speech)


def test_an_interrupt_drops_the_speech_and_a_new_turn_is_said(page: str):
    expected = speak(TEXT, Voice("en-us")).speech

    async def visit():
        async with talking(page) as talker:
            await talker.send(type="speech.text", text=LONG_TEXT, turn=0)
            await talker.speech(7_680)
            await talker.send(type="speech.interrupt", turn=1)
            await talker.send(type="speech.text", text="of the turn before", turn=0)
            await talker.speak(noise_speech(0.5), turn=0)
            await talker.send(type="speech.text", text=TEXT, turn=1)
            blocks = []
            while sum(len(block.sound) for block in new_speech(blocks)) < len(expected) + 7_680:
                blocks.append(await talker.block())
            return blocks

    blocks = asyncio.run(visit())
    late = [block for block in blocks if block.turn == 0]
    assert len(late) <= 4, "more came than was on its way: two blocks ahead of playback, and two that were not read"
    assert_said(np.concatenate([block.sound for block in new_speech(blocks)]), expected)


def new_speech(blocks: list[Shown]) -> list[Shown]:
    """The blocks of turn 1 from the first one that speaks on."""
    new = [block for block in blocks if block.turn == 1]
    return list(itertools.dropwhile(lambda block: not block.is_speech, new))


def test_a_third_visitor_is_told_that_it_is_full_and_a_place_is_free_when_one_leaves(
    server: TritonServer, monkeypatch: pytest.MonkeyPatch
):
    """At once: not when no ping has been answered for long, which here is longer than the test waits."""
    monkeypatch.setattr(web_server, "_SILENT_S", 10 * PATIENCE_S)

    async def visit(page: str):
        async with talking(page), visiting(page) as third:
            async with talking(page) as second:
                await third.start()
                error = await third.error()
                second.socket.transport.abort()  # as when a tab is closed
            async with talking(page):
                return error

    with page_of(WebOptions(server.options.url, port=0, portraits=PORTRAITS)) as page:
        error = asyncio.run(visit(page))
    assert (error["code"], error["ends"]) == ("full", True)
    assert "2 of 2" in error["message"] or "2 sessions" in error["message"], error


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((width, height), 60).convert("RGB").save(file, "PNG")
    return file.getvalue()


def test_a_visitors_own_picture_is_shown(page: str, picture: bytes):
    async def first_block(**fields):
        async with talking(page, label="", **fields) as talker:
            return (await talker.block()).frames()

    own = asyncio.run(first_block(portrait=None, picture=picture))
    np.testing.assert_array_equal(own, asyncio.run(first_block(portrait="Robin")))


BAD_STARTS = {
    "other version": (
        {"version": 0},
        "protocol",
        "speaks version 0 of the protocol, and this server version 1",
    ),
    "no version": ({"version": None}, "protocol", "speaks version None"),
    "seed": ({"seed": -1}, "protocol", "seed is -1; send an integer from 0 to"),
    "seed of words": ({"seed": "x"}, "protocol", "seed is 'x'; send an integer"),
    "prompt": ({"prompt": "x" * 2001}, "invalid", "prompt has 2001 characters; pass at most 2000"),
    "prompt of numbers": ({"prompt": 1}, "protocol", "prompt is 1; send a string"),
    "label": ({"label": "x" * 65}, "invalid", "label has 65 characters"),
    "label of two lines": ({"label": "a\nb"}, "invalid", "pass one line of printable characters"),
    "portrait": ({"portrait": "../../etc/passwd"}, "invalid", "there is no portrait '../../etc/passwd'; choose one of"),
    "quality": ({"jpeg_quality": 0}, "protocol", "jpeg_quality is 0; send an integer from 1 to 95"),
}


@pytest.mark.parametrize(("fields", "code", "sentence"), BAD_STARTS.values(), ids=BAD_STARTS)
def test_wrong_settings_are_refused_in_a_sentence(page: str, fields, code: str, sentence: str):
    async def visit():
        async with visiting(page) as talker:
            await talker.start(**fields)
            return await talker.error()

    error = asyncio.run(visit())
    assert (error["code"], error["ends"]) == (code, True)
    assert sentence in error["message"]


GARBAGE = {
    "no JSON": ("hello", "a message is 'hello'; send a JSON object"),
    "a list": ("[1]", "a message is '[1]'; send a JSON object"),
    "deep": ("[" * 10_000, "send a JSON object"),
    "megabyte": ("x" * 1_000_000, "a message has 1000000 characters; send at most 65536"),
    "another type": ('{"type": "dance"}', "has the type 'dance'; send session.start"),
    "no bytes": (b"", "a binary message begins with None"),
    "bytes": (b"\xff\x00\x01", "a binary message begins with 255; send 1 before a picture, 2 before speech"),
    "half a sample": (b"\x02" + b"\0" * 8, "a message of speech has 9 bytes; send 8 bytes of header and 2 for"),
    "early speech": (b"\x02" + b"\0" * 9, "the first message is a speech; send session.start first"),
}


@pytest.mark.parametrize(("message", "sentence"), GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_refused_in_a_sentence_and_closes_the_connection(page: str, message, sentence: str):
    async def visit():
        async with visiting(page) as talker:
            await talker.socket.send(message)
            error = await talker.error()
            with pytest.raises(ConnectionClosed):
                await talker.receive()
            return error

    error = asyncio.run(visit())
    assert error["code"] == "protocol"
    assert sentence in error["message"]


def test_bad_pictures_are_refused_in_a_sentence(page: str):
    async def visit(data: bytes):
        async with visiting(page) as talker:
            await talker.start(portrait=None)
            await talker.socket.send(b"\x01" + data)
            return await talker.error()

    assert "the image has 0 bytes; pass a PNG, JPEG or WebP file" in asyncio.run(visit(b""))["message"]
    assert "which is no PNG, JPEG or WebP file" in asyncio.run(visit(b"GIF89a"))["message"]
    broken = asyncio.run(visit(png(64, 64)[:200]))
    assert (broken["code"], broken["ends"]) == ("invalid", True)
    with pytest.raises(ConnectionClosed, match="1009"):
        asyncio.run(visit(bytes(MAX_PICTURE_BYTES + 100)))


def test_a_text_that_cannot_be_said_is_told_and_the_conversation_goes_on(page: str):
    async def visit():
        async with talking(page) as talker:
            errors = []
            for text in ("", " \n", "x" * 1_001, "\u200b"):
                await talker.send(type="speech.text", text=text, turn=0)
                errors.append(await talker.error())
            await talker.send(type="speech.text", text="\N{GRINNING FACE}\N{PILE OF POO}", turn=0)
            await talker.speech(640)
            return errors

    errors = asyncio.run(visit())
    assert {(error["code"], error["ends"]) for error in errors} == {("invalid", False)}
    sentences = ("the text is empty", "the text is empty", "has 1001 characters; send at most 1000", "type words")
    for error, sentence in zip(errors, sentences, strict=True):
        assert sentence in error["message"]


def test_too_much_at_once_is_told(page: str):
    async def visit():
        async with talking(page) as talker:
            await talker.speak(noise_speech(20))
            await talker.speak(noise_speech(20))
            waiting = await talker.error()
            await talker.send(type="speech.interrupt", turn=1)
            for _ in range(12):
                await talker.send(type="speech.text", text=LONG_TEXT, turn=1)
            texts = await talker.error()
            for _ in range(500):
                await talker.send(type="speech.text", text="", turn=0)
            while not (flood := await talker.error())["ends"]:
                pass
            return waiting, texts, flood

    waiting, texts, flood = asyncio.run(visit())
    assert "s of speech wait, and 20 s more came; send speech as it is spoken, at most 30 s ahead" in waiting["message"]
    assert "texts wait to be spoken" in texts["message"]
    assert "more than 200 messages came in a second" in flood["message"]


def test_a_turn_must_count_up(page: str):
    async def visit():
        async with talking(page) as talker:
            await talker.send(type="speech.interrupt", turn=0)
            return await talker.error()

    error = asyncio.run(visit())
    assert (error["code"], error["message"]) == ("protocol", "the turn 0 begins after turn 0; count up")


def test_an_address_has_a_number_of_conversations(server: TritonServer, picture: bytes, tmp_path: Path):
    image = tmp_path / "Face.png"
    image.write_bytes(picture)

    async def visit(page: str):
        async with talking(page, portrait="Face"), visiting(page) as second:
            return await second.error()

    with page_of(WebOptions(server.options.url, port=0, portraits={"Face": image}, sessions_per_address=1)) as page:
        error = asyncio.run(visit(page))
    assert error["code"] == "full"
    assert "your address has 1 conversations open, the limit; close one of them" in error["message"]


@pytest.mark.slow  # until the buffers are full and the time limit is over: 20 s
def test_a_visitor_who_reads_nothing_loses_the_place(server: TritonServer, page: str, picture: bytes):
    async def visit():
        reader, writer = await asyncio.open_connection(*page.removeprefix("http://").split(":"), limit=1024)
        writer.write(
            b"GET /talk HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        await reader.readuntil(b"\r\n\r\n")
        start = b'{"type": "session.start", "version": 1, "portrait": "Robin", "jpeg_quality": 95}'
        writer.write(b"\x81" + bytes([0x80 | len(start)]) + bytes(4) + start)
        await reader.readexactly(2_000)  # it has begun, and now nobody reads
        async with talking(page):
            assert not has_place(server, picture)
            await asyncio.to_thread(await_place, server, picture)
        writer.transport.abort()

    asyncio.run(visit())


def has_place(server: TritonServer, picture: bytes) -> bool:
    try:
        with AvatarSession(server.options.url, image=picture) as session:
            session.send(noise_speech(0.5))
            next(iter(session))
    except SessionRefused:
        return False
    return True


def await_place(server: TritonServer, picture: bytes) -> None:
    deadline_s = time.monotonic() + 2 * PATIENCE_S
    while not has_place(server, picture):
        assert time.monotonic() < deadline_s, "the place is still taken"
        time.sleep(0.2)
