"""Several speakers in one picture: whose speech a chunk is, and masks."""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from live_avatar_client import (
    AsyncAvatarSession,
    AvatarSession,
    Block,
    InvalidInput,
    MediaError,
    ServerIncompatible,
    SessionRefused,
    Speaker,
)
from live_avatar_client.cutter import Samples
from live_avatar_client.protocol import BLOCK_SAMPLES, MAX_IMAGE_BYTES, MAX_MASK_BYTES
from live_avatar_client.speakers import mask_bytes, mixed, speech_of
from live_avatar_client.testing import SAMPLE_IMAGE, FakeAvatarServer, sample_speech, synthetic_frame

PNG = SAMPLE_IMAGE
TWO = [Speaker(mask=PNG), Speaker(mask=(24, 0, 24, 32))]
ONE, OTHER = sample_speech(1000), sample_speech(700)
Turns = Sequence[tuple[object, int | None]]
Play = Callable[[str, Turns], list[Block]]


def play_sync(url: str, turns: Turns) -> list[Block]:
    with AvatarSession(url, image=SAMPLE_IMAGE, speakers=TWO) as session:
        for pcm, speaker in turns:
            session.send(pcm, speaker=speaker)
        session.end()
        return list(session)


def play_async(url: str, turns: Turns) -> list[Block]:
    async def play() -> list[Block]:
        async with AsyncAvatarSession(url, image=SAMPLE_IMAGE, speakers=TWO) as session:
            for pcm, speaker in turns:
                await session.send(pcm, speaker=speaker)
            await session.end()
            return [block async for block in session]

    return asyncio.run(play())


both_ways = pytest.mark.parametrize("play", [play_sync, play_async])


def rows(*speech: Samples) -> Samples:
    longest = max(map(len, speech))
    return np.stack([np.pad(one, (0, longest - len(one))) for one in speech])


NOTHING = np.zeros(0, np.int16)


@pytest.mark.parametrize(
    ("pcm", "speaker", "expected"),
    [
        (ONE, 0, rows(ONE, NOTHING)),
        (ONE, 1, rows(NOTHING, ONE)),
        (ONE, np.int64(1), rows(NOTHING, ONE)),
        ({0: ONE, 1: OTHER}, None, rows(ONE, OTHER)),
        ({1: ONE, 0: OTHER}, None, rows(OTHER, ONE)),
        ({1: OTHER}, None, rows(NOTHING, OTHER)),
        ({}, None, rows(NOTHING, NOTHING)),
        ({0: np.array([0.5, -0.5], np.float32)}, None, rows(np.array([16384, -16384], np.int16), NOTHING)),
    ],
)
def test_who_is_not_named_is_silent_and_who_stops_first_too(
    pcm: object, speaker: int | None, expected: Samples
) -> None:
    chunk = speech_of(pcm, speaker, 2)
    assert chunk.dtype == np.int16
    assert np.array_equal(chunk, expected)


@pytest.mark.parametrize(("pcm", "speaker"), [(ONE, None), (ONE, 0), ({0: ONE}, None)])
def test_one_speaker_alone_may_be_named(pcm: object, speaker: int | None) -> None:
    assert np.array_equal(speech_of(pcm, speaker, 1), ONE)


@pytest.mark.parametrize(
    ("pcm", "speaker", "speakers", "words"),
    [
        (ONE, 1, 1, r"the session has no speaker 1; it has one speaker, 0"),
        (ONE, 2, 2, r"the session has no speaker 2; it has the speakers 0 to 1"),
        (ONE, -1, 2, r"the session has no speaker -1"),
        (ONE, True, 2, r"the session has no speaker True"),
        ({"a": ONE}, None, 2, r"the session has no speaker 'a'"),
        ({0: ONE, 3: ONE}, None, 3, r"the session has no speaker 3; it has the speakers 0 to 2"),
        (ONE, None, 2, r"the session has 2 speakers, and pcm is of none; pass speaker=0 to speaker=1, or a dict"),
        ({0: ONE}, 0, 2, r"pcm already names its speakers, and speaker is 0; leave speaker out"),
        ({0: b"pcm"}, None, 2, r"pcm is a bytes; pass a numpy array"),
    ],
)
def test_speech_of_nobody_is_refused(pcm: object, speaker: int | None, speakers: int, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        speech_of(pcm, speaker, speakers)


@both_ways
def test_the_server_gets_masks_and_a_block_of_each_speaker(play: Play) -> None:
    """Turns and speech at the same time, in chunks that are no whole blocks."""
    turns: Turns = [(ONE, 0), (OTHER, 1), ({0: sample_speech(9000), 1: OTHER}, None), (ONE, 1)]
    said = np.concatenate(
        [rows(ONE, NOTHING), rows(NOTHING, OTHER), rows(sample_speech(9000), OTHER), rows(NOTHING, ONE)], axis=1
    )
    with FakeAvatarServer(speakers=2) as server:
        blocks = play(server.url, turns)
    (session,) = server.sessions
    assert session.masks == (PNG, b"24,0,24,32")
    assert [block.shape for block in session.blocks] == [(2, BLOCK_SAMPLES)] * 2
    assert np.array_equal(session.speech[:, : said.shape[1]], said)
    assert not session.speech[:, said.shape[1] :].any()
    assert session.ended
    audio = np.concatenate([block.audio for block in blocks], axis=1)
    assert np.array_equal(audio, session.speech[:, : audio.shape[1]])
    frames = np.concatenate([block.frames for block in blocks])
    assert len(frames) == -(-said.shape[1] // 640)
    for number, frame in enumerate(frames):
        assert np.array_equal(frame, synthetic_frame(number, 0, mixed(session.speech), 32, 48))


def test_chunks_of_a_stream_name_their_speakers() -> None:
    with FakeAvatarServer(speakers=2) as server, AvatarSession(server.url, image=PNG, speakers=TWO) as session:
        blocks = list(session.stream([{0: ONE}, {1: OTHER}]))
    assert sum(map(len, blocks)) == 3
    assert np.array_equal(
        server.sessions[0].speech[:, :1700], np.concatenate([rows(ONE, NOTHING), rows(NOTHING, OTHER)], 1)
    )


def test_an_idle_session_sends_silence_of_each() -> None:
    with (
        FakeAvatarServer(speakers=3) as server,
        AvatarSession(server.url, image=PNG, speakers=[*TWO, *TWO[:1]], idle=True) as session,
    ):
        blocks = list(itertools.islice(session, 2))
    assert [block.audio.shape for block in blocks] == [(3, BLOCK_SAMPLES)] * 2
    assert not server.sessions[0].speech.any()


def test_an_interrupt_and_a_keep_alive_are_as_with_one() -> None:
    with FakeAvatarServer(speakers=2) as server, AvatarSession(server.url, image=PNG, speakers=TWO) as session:
        session.send(ONE, speaker=0)
        session.interrupt()
        session.keep_alive()
        session.send(OTHER, speaker=1)
        session.end()
        assert sum(map(len, session)) == 2
    assert np.array_equal(server.sessions[0].speech[:, :700], rows(NOTHING, OTHER))


def test_a_server_of_one_speaker_is_known_before_the_start() -> None:
    words = "serves pictures of one speaker, and the session has 2; leave speakers out, or serve artifacts made with"
    with FakeAvatarServer() as server, pytest.raises(ServerIncompatible, match=words):
        AvatarSession(server.url, image=PNG, speakers=TWO).__enter__()


@pytest.mark.parametrize(
    ("speakers", "words"), [(3, "2 masks came for 3 speakers"), (2, "0 masks came for 2 speakers")]
)
def test_a_server_of_other_speakers_refuses(speakers: int, words: str) -> None:
    options: dict[str, Any] = {"speakers": TWO} if speakers == 3 else {}
    with (
        FakeAvatarServer(speakers=speakers) as server,
        AvatarSession(server.url, image=PNG, **options) as session,
        pytest.raises(SessionRefused, match=words),
    ):
        list(session)


@pytest.mark.parametrize(
    ("speakers", "words"),
    [
        ([TWO[0]], "speakers has 1 speaker; pass two or more, or leave speakers out"),
        (2, "speakers is a int; pass a list of Speaker"),
        ("ab", "speakers is a str; pass a list of Speaker"),
        ([TWO[0], PNG], r"speaker 1 is a bytes; pass Speaker\(mask=...\)"),
        ([TWO[0], Speaker(mask=None)], "the mask of speaker 1 is a NoneType; pass a PNG as bytes, its path, or a box"),
        (
            [Speaker(mask=b"JPEG"), TWO[0]],
            "the mask of speaker 0 starts with b'JPEG', which is no PNG; save it as a PNG",
        ),
        ([TWO[0], Speaker(mask=PNG + bytes(MAX_MASK_BYTES))], "speaker 1 has more than 1048576 bytes, the limit; save"),
        *[
            (
                [TWO[0], Speaker(mask=box)],
                "the mask of speaker 1 is the box .*; pass .x, y, width, height. in pixels of",
            )
            for box in ((1, 2, 3), (0, 0, 0, 5), (-1, 0, 5, 5), (0.5, 0, 5, 5), ("0", 0, 5, 5))
        ],
    ],
)
def test_what_is_no_speaker_is_refused(speakers: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        AvatarSession("localhost:1", image=PNG, speakers=speakers)


def test_a_mask_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    path.write_bytes(PNG)
    assert mask_bytes([Speaker(str(path)), Speaker(path)]) == (PNG, PNG)
    path.write_bytes(b"text")
    with pytest.raises(MediaError, match=r"the mask of speaker 1, '.*mask.png', starts with b'text', which is no PNG"):
        mask_bytes([TWO[0], Speaker(path)])
    with pytest.raises(MediaError, match=r"mask of speaker 1 '.*none.png' does not exist"):
        mask_bytes([TWO[0], Speaker(tmp_path / "none.png")])


def test_speech_is_mixed_without_overflow() -> None:
    loud = np.array([30000, -30000, 5], np.int16)
    assert mixed(np.stack([loud, loud])).tolist() == [32767, -32768, 10]
    assert mixed(loud) is loud


def test_image_and_masks_fit_into_one_message() -> None:
    image = PNG + bytes(MAX_IMAGE_BYTES - len(PNG))
    with pytest.raises(
        InvalidInput, match=r"the image and the masks have \d+ bytes, more than 33554432, the limit; save"
    ):
        AvatarSession("localhost:1", image=image, speakers=TWO)
