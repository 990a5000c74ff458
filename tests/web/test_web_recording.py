"""Recordings of conversations with the real server: what is in the file, its limits, and its endings."""

from __future__ import annotations

import asyncio
import datetime as dt
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from live_avatar import signing
from live_avatar.arrays import Array
from live_avatar.assets import PORTRAITS
from live_avatar.serving.server import TritonServer
from live_avatar_client.credentials import ContentCredentials
from live_avatar_client.errors import InvalidInput
from live_avatar_client.messages import Block
from live_avatar_client.web import recording
from live_avatar_client.web.options import WebOptions
from live_avatar_client.web.recording import Recording, Recordings
from perf.page import page_of
from tests.cli.support import invoke
from tests.conftest import noise_speech
from tests.web.support import PATIENCE_S, Shown, Talker, film, save, talking

PROVENANCE = {"generator": "Live Avatar on Triton", "version": "0.1"}


async def told(talker: Talker, kind: str, seen: list[Shown] | None = None) -> dict:
    """The next message of a kind; blocks before it are appended to `seen`."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            message = await talker.receive()
            if isinstance(message, dict):
                assert message["type"] == kind, message
                return message
            if seen is not None:
                seen.append(message)


async def begun(talker: Talker, seen: list[Shown] | None = None) -> str:
    """Begins a recording; the path of its file."""
    await talker.send(type="record.start")
    return (await told(talker, "record.started", seen))["path"]


def verify(file: bytes, folder: Path, *options: object) -> tuple[int, dict]:
    """Exit code and findings of `live-avatar verify`."""
    (folder / "saved.mp4").write_bytes(file)
    result = invoke("verify", folder / "saved.mp4", "--json", *options)
    return result.exit_code, json.loads(result.stdout)


def loudness(sound: Array, frames: int) -> Array:
    """Root mean square of each frame's 40 ms."""
    return np.sqrt(np.mean(np.square(sound[: 640 * frames].reshape(frames, 640)), axis=1))


def test_a_recording_has_the_frames_and_the_sound_that_were_shown(page: str, tmp_path: Path):
    """Also across an interruption, after which the turn has another number."""
    bursts = np.concatenate([noise_speech(0.3), np.zeros(6_400, np.int16)] * 4)

    async def visit():
        async with talking(page, label="AI-generated") as talker:
            seen = [await talker.block()]
            path = await begun(talker, seen)
            await talker.speak(bursts, turn=0)
            while sum(block.is_speech for block in seen) < 3:
                seen.append(await talker.block())
            await talker.send(type="speech.interrupt", turn=1)
            await talker.speak(bursts, turn=1)
            while sum(block.is_speech and block.turn == 1 for block in seen) < 4:
                seen.append(await talker.block())
            saving = asyncio.create_task(asyncio.to_thread(save, page, path))
            while not saving.done():  # the conversation goes on
                seen.append(await talker.block())
            seen.append(await talker.block())
            return seen, talker.ready["provenance"], await saving, await asyncio.to_thread(save, page, path)

    seen, provenance, (status, file), (again, sentence) = asyncio.run(visit())
    assert status == 200
    made = film(file)
    count = len(made.frames)
    assert made.times_s == pytest.approx([frame / 25 for frame in range(count)])
    frames = np.concatenate([block.frames() for block in seen])
    sound = np.concatenate([block.sound for block in seen]) / 32768
    offsets = range(len(frames) - count + 1)
    apart = [np.abs(frames[at : at + count, ::4, ::4].astype(int) - made.frames[:, ::4, ::4]).mean() for at in offsets]
    first = int(np.argmin(apart))
    assert apart[first] < 4
    assert first <= sum(len(block.jpegs) for block in seen[:3])
    assert len(made.sound) >= 640 * count
    shown_loudness = loudness(sound[640 * first :], count)
    lags = range(-6, 7)
    agreeing = [np.corrcoef(np.roll(loudness(made.sound, count), lag), shown_loudness)[0, 1] for lag in lags]
    assert lags[int(np.argmax(agreeing))] == 0
    assert max(agreeing) > 0.99
    code, found = verify(file, tmp_path)
    assert code == 1, "nothing is signed here"
    assert found["claims"] == provenance
    assert found["aigc_label"]
    assert not found["damaged"]
    assert (again, json.loads(sentence)["message"]) == (
        404,
        "there is no such recording; a file is kept for 60 s and can be saved once",
    )


def test_a_recording_is_signed(server: TritonServer, tmp_path: Path):
    assert invoke("signing-key", "studio", "--folder", tmp_path).exit_code == 0
    credentials = ContentCredentials(tmp_path / "studio.pem", tmp_path / "studio.key")
    options = WebOptions(server.options.url, port=0, portraits=PORTRAITS, credentials=credentials)

    async def visit(page: str):
        async with talking(page) as talker:
            path = await begun(talker)
            seen: list[Shown] = []
            while len(seen) < 3:
                seen.append(await talker.block())
            return await asyncio.to_thread(save, page, path)

    with page_of(options) as page:
        _, file = asyncio.run(visit(page))
    code, found = verify(file, tmp_path, "--trust", tmp_path / "studio-ca.pem")
    assert code == 0
    assert (found["manifest"]["state"], found["manifest"]["signer"]) == ("trusted", "studio")
    assert found["manifest"]["is_ai"]
    assert len(film(file).frames) == found["frames"]


def test_a_conversation_that_ends_leaves_its_recording(page: str):
    async def visit() -> str:
        async with talking(page) as talker:
            path = await begun(talker)
            for _ in range(3):
                await talker.block()
            return path

    status, file = save(page, asyncio.run(visit()))
    assert status == 200
    assert len(film(file).frames) >= 12


def test_what_cannot_be_recorded_is_told_and_the_conversation_goes_on(page: str, monkeypatch: pytest.MonkeyPatch):
    async def visit() -> list[str]:
        sentences = []
        async with talking(page) as first, talking(page) as second:
            path = await begun(first)
            await first.block()
            await first.block()
            await first.send(type="record.start")
            sentences.append((await first.error())["message"])
            monkeypatch.setattr(recording, "MOST_OF_AN_ADDRESS", 1)
            await second.send(type="record.start")
            sentences.append((await second.error())["message"])
            monkeypatch.undo()
            monkeypatch.setattr(recording, "MOST_RECORDINGS", 1)
            await second.send(type="record.start")
            sentences.append((await second.error())["message"])
            monkeypatch.undo()
            for headers in ({"Origin": "https://elsewhere.example"}, {}, {}):
                status, body = await asyncio.to_thread(save, page, path, **headers)
                sentences.append("" if status == 200 else json.loads(body)["message"])
            await first.block()
            await second.block()
        return sentences

    under_way, of_address, of_all, elsewhere, saved, again = asyncio.run(visit())
    assert under_way == "a recording is under way; save it before you begin another"
    assert of_address == "your address has 1 recordings, the limit; save one of them, and try again"
    assert of_all == "the page makes 1 recordings, the limit; try again in a minute"
    assert elsewhere == "another site asks for the recording; open the page itself"
    assert saved == ""
    assert "there is no such recording" in again


@pytest.mark.parametrize(
    ("limit", "value", "sentence"),
    [
        ("MAX_RECORDING_S", 1, "the recording has 1 s, the limit; it is complete up to here"),
        ("MAX_RECORDING_BYTES", 20_000, "the recording has 20000 bytes, the limit; it is complete up to here"),
    ],
)
def test_a_recording_ends_at_its_limit_with_a_file(
    page: str, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, sentence: str
):
    monkeypatch.setattr(recording, limit, value)

    async def visit():
        async with talking(page) as talker:
            path = await begun(talker)
            ended = await told(talker, "record.ended")
            return ended["message"], await asyncio.to_thread(save, page, path)

    said, (status, file) = asyncio.run(visit())
    assert said == sentence
    assert status == 200
    if limit == "MAX_RECORDING_S":
        assert 25 <= len(film(file).frames) < 25 + 12


# ---- Without a server


def block(jpegs: int = 12) -> Block:
    """A block of grey frames with noise as its sound."""
    picture = io.BytesIO()
    Image.new("RGB", (96, 97), "grey").save(picture, "JPEG")
    sound = noise_speech(jpegs / 25)
    return Block(0, 0, np.zeros((0, 97, 96, 3), np.uint8), (picture.getvalue(),) * jpegs, sound, False, 0, 0, 0, 0)


def test_a_server_that_is_too_busy_ends_the_recording_with_a_sentence(monkeypatch: pytest.MonkeyPatch):
    async def record() -> Recording:
        made = Recording(None)
        for _ in range(160):
            made.add(block(1), PROVENANCE)
        await made.run()
        return made

    made = asyncio.run(record())
    assert made.sentence == "the page's server is too busy to record; it is complete up to here"
    assert len(film(made.file).frames) == 151


def test_a_recording_without_a_frame_or_with_a_broken_one_has_no_file(caplog: pytest.LogCaptureFixture):
    async def record(*blocks: Block) -> Recording:
        made = Recording(None)
        for one in blocks:
            made.add(one, PROVENANCE)
        made.stop()
        made.add(block(), PROVENANCE)
        await made.run()
        return made

    empty = asyncio.run(record())
    assert (empty.file, empty.sentence) == (b"", "nothing was shown that could be recorded; record for longer")
    good = block(1)
    broken = Block(0, 0, good.frames, (b"no picture",), good.audio, False, 0, 0, 0, 0)
    failed = asyncio.run(record(good, broken))
    assert (failed.file, failed.sentence) == (b"", "the recording has failed; tell the page's operator")
    assert "a recording has failed" in caplog.text


def test_an_expired_certificate_gives_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(signing, "TRIAL_DAYS", -1)
    monkeypatch.setattr(signing, "BEFORE", dt.timedelta(days=30))
    certificate, key, _ = signing.make_pair("old", tmp_path)

    async def record() -> Recording:
        made = Recording(ContentCredentials(certificate, key))
        made.add(block(), PROVENANCE)
        made.stop()
        await made.run()
        return made

    made = asyncio.run(record())
    assert (made.file, made.sentence) == (b"", "the recording has failed; tell the page's operator")


def test_a_file_that_nobody_fetches_is_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recording, "KEPT_S", 0.01)
    monkeypatch.setattr(recording, "MOST_OF_AN_ADDRESS", 1)

    async def visit() -> None:
        recordings = Recordings(None)
        made = recordings.begin("192.0.2.1")
        recordings.begin("192.0.2.2")
        made.add(block(), PROVENANCE)
        made.stop()
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    recordings.begin("192.0.2.1")
                    break
                except InvalidInput:
                    await asyncio.sleep(0.01)
        with pytest.raises(InvalidInput, match=r"there is no such recording; a file is kept for 0\.01 s and can be"):
            await recordings.fetch(made.token)

    asyncio.run(visit())
