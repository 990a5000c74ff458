"""What a client can send wrong: one sentence each, and the server goes on serving others, and often the sender."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from live_avatar.arrays import Array
from live_avatar_client import AvatarSession, SessionRefused
from live_avatar_client.protocol import ErrorCode
from tests.serving.raw import BLOCK, RawSession, header_of_a_huge_png, raw_session
from tests.serving.support import at_once, frames_of, received, spoken


@pytest.fixture
def raw(url: str) -> Iterator[RawSession]:
    with raw_session(url) as session:
        yield session


@pytest.fixture(autouse=True)
def others_are_served(url: str, picture: bytes, speech: Array, expected: Array) -> Iterator[None]:
    """A session that was live before the mistake, and one that begins after it, get their right frames."""
    with AvatarSession(url, image=picture, prompt="hello", seed=3) as live:
        live.send(speech[:7680])
        first = next(iter(live))
        yield
        live.send(speech[7680 : 2 * 7680])
        live.end()
        frames = [first.frames, *(block.frames for block in live)]
    assert np.array_equal(np.concatenate(frames), expected[:24])
    assert np.array_equal(frames_of(received(url, picture, speech[:7680], at_once)), expected[:12])


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (b"", "the reference image has 0 bytes; send an encoded PNG, JPEG or WebP."),
        (b"Dear server, this is a text.", "is not a PNG, JPEG or WebP; convert it to one of these."),
        (header_of_a_huge_png(50_000), "has more than 64000000 pixels in all (Image size (2500000000 pixels)"),
        (header_of_a_huge_png(9_000), "is 9000x9000 pixels, more than 64000000 in all; scale it down first."),
        (header_of_a_huge_png(8), "is 8x8 pixels; each side needs at least 16."),
        (header_of_a_huge_png(500), "is damaged"),
    ],
    ids=["empty", "text", "huge", "large", "small", "broken"],
)
def test_images(raw: RawSession, image: bytes, sentence: str) -> None:
    """The large ones are refused by their header: decoding them would say that they are damaged."""
    error = raw.ask(image=image, start=True)
    assert "[INVALID_ARGUMENT]" in error
    assert sentence in error


def test_truncated_png(raw: RawSession, picture: bytes) -> None:
    error = raw.ask(image=picture[: len(picture) // 2], start=True)
    assert f"the reference image ({len(picture) // 2} bytes) is damaged" in error
    assert "send the whole file." in error


def test_first_request_without_an_image(raw: RawSession) -> None:
    assert "has no REFERENCE_IMAGE; send the picture with it." in raw.ask(start=True)


def test_prompt_of_100_000_characters(raw: RawSession, picture: bytes) -> None:
    error = raw.ask(image=picture, prompt=b"x" * 100_000, start=True)
    assert "PROMPT has 100000 characters; at most 2000 are taken." in error


def test_prompt_that_is_not_utf8(raw: RawSession, picture: bytes) -> None:
    error = raw.ask(image=picture, prompt=b"\xff\xfe", start=True)
    assert "PROMPT is not UTF-8" in error
    assert "encode it as UTF-8." in error


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"seed": -1}, "parameter seed is -1; it must be an integer from 0 to 9223372036854775807."),
        ({"seed": "seven"}, "parameter seed is 'seven'; it must be an integer from 0 to 9223372036854775807."),
        ({"seed": True}, "parameter seed is True; it must be an integer from 0 to 9223372036854775807."),
        ({"frame_format": "gif"}, "parameter frame_format is 'gif'; it must be raw or jpeg."),
        ({"frames_per_response": 6}, "parameter frames_per_response is 6; it must be 4 or 12."),
    ],
)
def test_parameters(raw: RawSession, picture: bytes, parameters: dict[str, object], sentence: str) -> None:
    assert sentence in raw.ask(image=picture, start=True, **parameters)


def test_a_block_of_the_wrong_length_costs_nothing_but_itself(
    raw: RawSession, picture: bytes, speech: Array, expected: Array
) -> None:
    raw.ask(speech[:7680], picture, b"hello", start=True, seed=3)
    for size in (1, 7679, 7681, 100_000):
        error = raw.ask(np.zeros(size, dtype=np.int16))
        assert f"AUDIO has {size} samples; a block has 7680 (pad the last one with zeros), a keep-alive 0." in error
    answer = raw.ask(speech[7680 : 2 * 7680])
    assert np.array_equal(answer.as_numpy("FRAMES"), expected[12:24])


def test_a_block_of_the_wrong_type(raw: RawSession, picture: bytes) -> None:
    raw.ask(BLOCK, picture, start=True)
    error = raw.ask(BLOCK.astype(np.float32))
    assert "AUDIO" in error
    assert "INT16" in error
    assert "FP32" in error


def test_a_second_start_leaves_the_session_as_it_was(
    raw: RawSession, picture: bytes, speech: Array, expected: Array
) -> None:
    raw.ask(speech[:7680], picture, b"hello", start=True, seed=3)
    error = raw.ask(speech[:7680], picture, start=True)
    assert f"session {raw.session} is live already; start the new session under another sequence id." in error
    assert np.array_equal(raw.ask(speech[7680 : 2 * 7680]).as_numpy("FRAMES"), expected[12:24])


def test_a_picture_in_the_middle(raw: RawSession, picture: bytes) -> None:
    raw.ask(BLOCK, picture, start=True)
    assert "REFERENCE_IMAGE came after the first request; start a new session" in raw.ask(BLOCK, picture)


def test_an_id_that_was_never_started(url: str) -> None:
    with raw_session(url) as raw:
        error = raw.ask(BLOCK)
    assert f"[FAILED_PRECONDITION] session {raw.session} is not open on this stream: it was never started" in error
    assert "send START with the first request of a session, and all its requests on one stream." in error


def test_the_session_too_many_is_refused_at_once_and_has_its_turn_later(url: str, picture: bytes) -> None:
    """It is refused while all the others are live, so it does not wait for one of them to end."""
    with ExitStack() as open_now:
        for _ in range(3):  # and the fixture's own, the fourth
            spoken(open_now.enter_context(AvatarSession(url, image=picture)), BLOCK)
        with AvatarSession(url, image=picture) as refused, pytest.raises(SessionRefused) as raised:
            spoken(refused, BLOCK)
    assert raised.value.code is ErrorCode.UNAVAILABLE
    assert "all 4 sessions of this server are taken; try again later or elsewhere." in str(raised.value)
    with AvatarSession(url, image=picture) as admitted:
        assert len(list(admitted.stream([BLOCK]))) == 1


def test_the_largest_id_that_grpc_clients_send(url: str, picture: bytes) -> None:
    with raw_session(url, 2**63 - 1) as raw:
        assert raw.ask(BLOCK, picture, start=True).as_numpy("FRAMES").shape == (12, 96, 96, 3)
