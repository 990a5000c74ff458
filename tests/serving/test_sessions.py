"""Several sessions at once on real servers: the one too many, fairness, known avatars, what a session may ask for."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from PIL import Image

from live_avatar.arrays import Array
from live_avatar.graphs.artifacts import Artifacts
from live_avatar.pipeline.generator import Generator
from live_avatar.serving import metrics
from live_avatar.serving.access import Access
from live_avatar.serving.server import TritonServer, serving
from live_avatar.serving.server_options import ServerOptions
from live_avatar.version import __version__
from live_avatar_client import AvatarSession, Block, SessionRefused
from live_avatar_client.protocol import BLOCK_SAMPLES, ErrorCode
from tests.conftest import noise_speech
from tests.serving.conftest import generated
from tests.serving.raw import BLOCK, NOTHING, raw_session
from tests.serving.support import (
    STAGES,
    assert_every_slot_serves,
    bystander,
    changes,
    frames_in,
    frames_of,
    frames_until,
    scrape,
    series,
    speech_of,
    spoken,
)

SESSIONS = 2
REFUSAL = f"all {SESSIONS} sessions of this server are taken; try again later or elsewhere."
IDLE_S = 300.0
"""Far above the limit on an answer in these tests, so no session has its turn because another one was silent."""
RUDE_CLIENTS = 40
START_S = 60.0
API_KEY = "an-api-key-of-callers"


@pytest.fixture(scope="module")
def small(artifacts: Artifacts) -> Iterator[TritonServer]:
    """A server of two sessions."""
    options = ServerOptions(artifacts.folder, max_sessions=SESSIONS, idle_seconds=IDLE_S).on_free_ports()
    with serving(options) as running:
        yield running


@pytest.fixture
def small_url(small: TritonServer) -> str:
    return small.options.url


@pytest.fixture(scope="module")
def other_picture() -> bytes:
    pixels = np.random.default_rng(8).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


# Full


def test_the_session_too_many_is_refused_at_once_and_disturbs_nobody(
    small: TritonServer, small_url: str, picture: bytes, speech: Array, expected: Array
) -> None:
    before = scrape(small)
    with bystander(small_url, picture, speech, expected):
        with AvatarSession(small_url, image=picture, prompt="hello", seed=3) as second:
            first = spoken(second, speech_of(speech, 0, 1))
            assert scrape(small)[series(metrics.SESSIONS_FREE)] == 0
            with AvatarSession(small_url, image=picture) as refused, pytest.raises(SessionRefused) as raised:
                spoken(refused, BLOCK)
            assert raised.value.code is ErrorCode.UNAVAILABLE
            assert REFUSAL in str(raised.value)
            second.send(speech_of(speech, 1, 2))
            second.end()
            assert np.array_equal(frames_of([first, *second]), frames_until(expected, 2))
        with AvatarSession(small_url, image=picture, prompt="hello", seed=3) as third:  # the slot is free again
            assert np.array_equal(frames_of(list(third.stream([speech_of(speech, 0, 1)]))), frames_until(expected, 1))
    assert changes(before, scrape(small), metrics.SESSIONS_REFUSED) == {"full": 1}
    assert_every_slot_serves(small, picture, speech, expected)


@pytest.mark.slow
def test_clients_that_do_not_end_after_a_refusal_shut_nobody_out(
    small: TritonServer, small_url: str, picture: bytes, speech: Array, expected: Array
) -> None:
    """There are many more of them than slots."""
    before = scrape(small)
    with bystander(small_url, picture, speech, expected):
        with bystander(small_url, picture, speech, expected):
            for _ in range(RUDE_CLIENTS):
                with raw_session(small_url) as rude:
                    assert f"[UNAVAILABLE] {REFUSAL}" in rude.ask(NOTHING, picture, start=True)
                    rude.vanish()
        with AvatarSession(small_url, image=picture, prompt="hello", seed=3) as good:
            assert np.array_equal(frames_of(list(good.stream([speech_of(speech, 0, 2)]))), frames_until(expected, 2))
    assert changes(before, scrape(small), metrics.SESSIONS_REFUSED) == {"full": RUDE_CLIENTS}
    assert_every_slot_serves(small, picture, speech, expected)


# Fairness


def streamed(
    url: str, together: Barrier, picture: bytes, prompt: str, seed: int, speech: Array, in_flight: int
) -> list[Block]:
    """The blocks of a session that sends as fast as it gets them, `in_flight` ahead, once the others are live too.

    A start yields to sessions that are live, because new avatars are encoded with low priority.
    """
    with AvatarSession(url, image=picture, prompt=prompt, seed=seed, max_in_flight_blocks=in_flight) as session:
        first = spoken(session, speech_of(speech, 0, 1))
        together.wait(START_S)
        return [first, *session.stream([speech[BLOCK_SAMPLES:]])]


def median_wait_s(blocks: list[Block]) -> float:
    return float(np.median([block.received_at_s - block.sent_at_s for block in blocks]))


@pytest.mark.slow
def test_sessions_at_their_own_pace_do_not_meet_and_do_not_starve(
    url: str, picture: bytes, other_picture: bytes, oracle: Generator
) -> None:
    """One floods the server, two send the next block when they have the last: these wait less for each of theirs."""
    wishes = [
        (picture, "hello", 5, noise_speech(3.84, 31), 8),
        (other_picture, "waves", 6, noise_speech(1.92, 32), 1),
        (picture, "", 7, noise_speech(1.92, 33), 1),
    ]
    together = Barrier(len(wishes))
    with ThreadPoolExecutor(len(wishes)) as pool:
        results = list(pool.map(lambda wish: streamed(url, together, *wish), wishes))
    for (image, prompt, seed, speech, _), blocks in zip(wishes, results, strict=True):
        assert np.array_equal(frames_of(blocks), generated(oracle, image, prompt, seed, speech)), f"seed {seed}"
    flood, *modest = results
    for blocks in modest:
        assert median_wait_s(blocks[1:]) < median_wait_s(flood[1:])
    # None has to wait until another one is through.
    starts_s, ends_s = zip(*((blocks[1].received_at_s, blocks[-1].received_at_s) for blocks in results), strict=True)
    assert max(starts_s) < min(ends_s)


# Known avatars


@pytest.fixture(scope="module")
def remembering(artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server that remembers one avatar, of a caller with a key: without keys each connection is another caller."""
    keys = tmp_path_factory.mktemp("keys") / "api.key"
    keys.write_text(API_KEY)
    options = ServerOptions(artifacts.folder, known_avatars=1, access=Access(api_key_file=keys)).on_free_ports()
    with serving(options) as running:
        yield running


def seen(server: TritonServer, work: Callable[[], None]) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """What `work` adds to the stages' cache hits and misses, and to the gateway's sessions by avatar."""
    before = scrape(server)
    work()
    after = scrape(server)
    hits, misses, prepared = metrics.AVATAR_HITS, metrics.AVATAR_MISSES, metrics.AVATARS_PREPARED
    return changes(before, after, hits), changes(before, after, misses), changes(before, after, prepared)


CACHES = STAGES[1:]
"""The stages that keep work of an avatar."""
ONE_EACH = dict.fromkeys(CACHES, 1)
KNOWN, NEW = (ONE_EACH, {}, {"known": 1}), ({}, ONE_EACH, {"new": 1})


def test_a_known_avatar_starts_without_work_and_an_older_one_is_forgotten(
    remembering: TritonServer, picture: bytes, other_picture: bytes, speech: Array, expected: Array
) -> None:
    """Before and after the sink's update (block 5), which must not reach what sessions share."""

    def run(image: bytes, blocks: int) -> Array:
        url = remembering.options.url
        with AvatarSession(url, image=image, prompt="hello", seed=3, api_key=API_KEY) as session:
            return frames_of(list(session.stream([speech_of(speech, 0, blocks)])))

    def known() -> None:
        assert np.array_equal(run(picture, 6), frames_until(expected, 6))

    others = run(other_picture, 1)
    assert seen(remembering, known) == NEW
    assert seen(remembering, known) == KNOWN
    numbers = scrape(remembering)
    assert {numbers[series(metrics.AVATARS, stage)] for stage in CACHES} == {1}
    assert numbers[series(metrics.KNOWN_AVATARS)] == 1

    def forgotten() -> None:
        assert np.array_equal(run(other_picture, 1), others)

    assert seen(remembering, forgotten) == NEW, "one avatar is remembered, the latest"


def test_sessions_of_one_avatar_share_it_while_both_are_live(
    remembering: TritonServer, picture: bytes, speech: Array, oracle: Generator, expected: Array
) -> None:
    """One replaces its sink while the other still has that of the avatar."""
    url = remembering.options.url
    with raw_session(url, api_key=API_KEY) as ahead, raw_session(url, api_key=API_KEY) as behind:
        first = [ahead.ask(speech_of(speech, 0, 1), picture, b"hello", start=True, seed=3)]

        def start() -> None:
            first.append(behind.ask(speech_of(speech, 0, 1), picture, b"hello", start=True, seed=4))

        assert seen(remembering, start) == KNOWN
        rest = [ahead.ask(speech_of(speech, block, block + 1)) for block in range(1, 6)]
        last = [behind.ask(speech_of(speech, block, block + 1)) for block in range(1, 6)]
    assert np.array_equal(frames_from([first[0], *rest]), frames_until(expected, 6))
    assert np.array_equal(
        frames_from([first[1], *last]), generated(oracle, picture, "hello", 4, speech_of(speech, 0, 6))
    )


def frames_from(answers: list[Any]) -> Array:
    return np.concatenate([frames_in(answer) for answer in answers])


# What a session may ask for


def opened(url: str, picture: bytes, speech: Array, **wishes: Any) -> tuple[Block, AvatarSession]:
    with AvatarSession(url, image=picture, prompt="hello", seed=3, **wishes) as session:
        (block,) = session.stream([speech_of(speech, 0, 1)])
    return block, session


def test_jpeg_quality_decides_the_size(url: str, picture: bytes, speech: Array) -> None:
    sizes = []
    for quality in (95, 90, 50, 1):
        block, _ = opened(url, picture, speech, frame_format="jpeg", jpeg_quality=quality)
        assert len(block.jpegs) == 12
        assert {Image.open(io.BytesIO(jpeg)).size for jpeg in block.jpegs} == {(96, 96)}
        sizes.append(sum(map(len, block.jpegs)))
    assert all(larger > smaller for larger, smaller in pairwise(sizes)), sizes
    default, _ = opened(url, picture, speech, frame_format="jpeg")
    assert sum(map(len, default.jpegs)) == sizes[1]


def test_a_label_changes_the_lower_right_corner_alone(url: str, picture: bytes, speech: Array, expected: Array) -> None:
    block, _ = opened(url, picture, speech, label="AI")
    changed = (block.frames != frames_until(expected, 1)).any(axis=(0, 3))  # [H, W]
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    assert rows.min() > 48
    assert columns.min() > 48
    assert changed[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].mean() > 0.9, "a filled box"
    assert np.array_equal(opened(url, picture, speech)[0].frames, frames_until(expected, 1)), "off by default"


def test_provenance_says_what_made_the_video(url: str, artifacts: Artifacts, picture: bytes, speech: Array) -> None:
    _, session = opened(url, picture, speech)
    assert session.provenance is not None
    made = dict(session.provenance)
    assert "T" in made.pop("created")
    assert re.fullmatch("[0-9a-f]{12}", made.pop("session_number"))
    assert made == {
        "generator": "Live Avatar on Triton",
        "version": __version__,
        "preset": "tiny",
        "artifacts": artifacts.fingerprint,
        "seed": 3,
        "picture_sha256": hashlib.sha256(picture).hexdigest(),
        "prompt_sha256": hashlib.sha256(b"hello").hexdigest(),
    }


def test_provenance_comes_once(url: str, picture: bytes) -> None:
    with raw_session(url) as raw:
        rows = [len(raw.ask(BLOCK, picture, start=True).as_numpy("PROVENANCE"))]
        rows += [len(raw.ask(audio).as_numpy("PROVENANCE")) for audio in (BLOCK, NOTHING)]
    assert rows[0] > 100
    assert rows[1:] == [0, 0]


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"jpeg_quality": "high"}, "parameter jpeg_quality is 'high'; it must be an integer from 1 to 95."),
        ({"jpeg_quality": 0}, "parameter jpeg_quality is 0; it must be an integer from 1 to 95."),
        ({"jpeg_quality": 96}, "parameter jpeg_quality is 96; it must be an integer from 1 to 95."),
        ({"jpeg_quality": True}, "parameter jpeg_quality is True; it must be an integer from 1 to 95."),
        ({"label": 7}, "parameter label is 7; it must be a string of at most 64 characters."),
        ({"label": "A" * 65}, "it must be a string of at most 64 characters."),
        ({"label": " "}, "the label ' ' is blank; give it letters, or leave it out."),
        ({"label": "A" * 64}, "but frames have 96x96; shorten it."),
        ({"fault": 7}, "there is no parameter 'fault'; leave it out, or use one of end_reason, "),
    ],
)
def test_wishes_of_the_wrong_kind(
    server: TritonServer, picture: bytes, parameters: dict[str, Any], sentence: str
) -> None:
    before = scrape(server)
    with raw_session(server.options.url) as raw:
        error = raw.ask(BLOCK, picture, start=True, **parameters)
    assert "[INVALID_ARGUMENT]" in error
    assert sentence in error
    after = scrape(server)
    assert changes(before, after, metrics.SESSIONS_REFUSED) == {"input": 1}
    assert after[series(metrics.SESSIONS_ADMITTED)] == before[series(metrics.SESSIONS_ADMITTED)]


def test_an_id_of_letters(url: str, picture: bytes) -> None:
    with raw_session(url, "speaker-7") as raw:
        error = raw.ask(BLOCK, picture, start=True)
    assert "[INVALID_ARGUMENT] the sequence id is 'speaker-7'; it must be an integer from 1 to " in error
