"""The session without its network: cutting, trimming, look-ahead, limits and times."""

import math
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from live_avatar_client import (
    AnswerTimeout,
    Block,
    InvalidInput,
    SendTimeout,
    ServerIncompatible,
    SessionClosed,
    SessionFailed,
    SessionRefused,
)
from live_avatar_client.core import (
    BlockCutter,
    Limits,
    Opening,
    Request,
    Response,
    SessionCore,
    Steps,
    as_samples,
)
from live_avatar_client.protocol import BLOCK_SAMPLES, ErrorCode, FrameFormat
from live_avatar_client.testing import SAMPLE_IMAGE, sample_speech

FPB = 12


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Harness:
    """A core with a perfect server: answers are due at once, or held back with `hold`."""

    def __init__(
        self,
        lookahead: int = 0,
        in_flight: int = 8,
        unread: int = 1000,
        frame_format: FrameFormat = FrameFormat.RAW,
    ) -> None:
        self.clock = Clock()
        limits = Limits(in_flight, unread, send_timeout_s=5, answer_timeout_s=60)
        self.core = SessionCore(Opening(SAMPLE_IMAGE, "hi", 3, frame_format), limits, self.clock)
        self.core.open()
        self.lookahead = lookahead
        self.hold = False
        self.requests: list[Request] = []
        self.answered = 0
        self.blocks_answered = 0

    def flush(self) -> None:
        while request := self.core.next_request():
            self.requests.append(request)
        if not self.hold:
            self.answer()

    def answer(self) -> None:
        while self.answered < len(self.requests):
            request = self.requests[self.answered]
            self.answered += 1
            self.core.receive(self.response(len(request.audio)))
            while request := self.core.next_request():
                self.requests.append(request)

    def response(self, samples: int) -> Response:
        count = FPB if samples else 0
        first = self.blocks_answered * FPB - self.lookahead
        self.blocks_answered += bool(samples)
        frames = np.zeros((count, 2, 2, 3), np.uint8)
        frames[...] = np.arange(first, first + count).reshape(-1, 1, 1, 1) % 256
        return Response(frames, (), first)

    def run(self, steps: Steps[None]) -> None:
        for _ in steps:
            self.flush()
            self.clock.now_s += 1
        self.flush()

    def speak(self, chunks: Iterable[object]) -> None:
        for chunk in chunks:
            self.run(self.core.send(chunk))

    def end(self) -> None:
        self.core.end()
        self.flush()

    def blocks(self) -> list[Block]:
        blocks = []
        while True:
            steps = self.core.next_block()
            try:
                next(steps)
            except StopIteration as done:
                if done.value is None:
                    return blocks
                blocks.append(done.value)
                self.flush()
            else:
                raise AssertionError("the core waits although everything was answered")


@given(st.lists(st.integers(0, 20_000), max_size=8))
@settings(max_examples=60, deadline=None)
def test_cutting_keeps_every_sample(sizes: list[int]) -> None:
    speech = sample_speech(sum(sizes))
    cutter = BlockCutter()
    blocks = []
    for chunk in np.split(speech, np.cumsum(sizes)[:-1]) if sizes else []:
        blocks += cutter.add(chunk, 0.0)
    blocks += cutter.finish()
    joined = np.concatenate([np.zeros(0, np.int16), *(block.samples for block in blocks)])
    assert all(block.samples.shape == (BLOCK_SAMPLES,) for block in blocks)
    assert cutter.samples == len(speech)
    assert np.array_equal(joined[: len(speech)], speech)
    assert not joined[len(speech) :].any()
    assert len(joined) - len(speech) < BLOCK_SAMPLES


@given(
    sizes=st.lists(st.integers(0, 30_000), min_size=1, max_size=5).filter(sum),
    lookahead=st.integers(0, 40),
    in_flight=st.integers(1, 8),
    held=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_every_frame_comes_once(sizes: list[int], lookahead: int, in_flight: int, held: bool) -> None:
    harness = Harness(lookahead, in_flight)
    if held:  # nothing is answered before the end, so the look-ahead is not known at the end
        sizes = [min(sum(sizes), in_flight * BLOCK_SAMPLES)]
        harness.hold = True
    harness.speak(sample_speech(size) for size in sizes)
    harness.end()
    harness.hold = False
    harness.flush()
    blocks = harness.blocks()
    frames = math.ceil(sum(sizes) / 640)
    assert [n for b in blocks for n in range(b.first_frame, b.first_frame + len(b))] == list(range(frames))
    assert [int(f[0, 0, 0]) for b in blocks for f in b.frames] == [n % 256 for n in range(frames)]
    assert [b.index for b in blocks] == list(range(len(blocks)))
    assert [r.end for r in harness.requests] == [False] * (len(harness.requests) - 1) + [True]
    assert [r.opening is not None for r in harness.requests] == [True] + [False] * (len(harness.requests) - 1)
    assert len({r.sequence_id for r in harness.requests}) == 1
    assert sum(len(r.audio) > 0 for r in harness.requests) == math.ceil((frames + lookahead) / FPB)


def test_end_rides_on_the_last_block_once_the_lookahead_is_known() -> None:
    harness = Harness()
    harness.speak([sample_speech(BLOCK_SAMPLES), sample_speech(100)])
    harness.end()
    assert [len(r.audio) for r in harness.requests] == [0, BLOCK_SAMPLES, BLOCK_SAMPLES]
    assert harness.requests[-1].end


def test_end_goes_alone_when_the_last_block_is_already_sent() -> None:
    harness = Harness()
    harness.speak([sample_speech(BLOCK_SAMPLES)])
    harness.end()
    assert [len(r.audio) for r in harness.requests] == [0, BLOCK_SAMPLES, 0]


def test_the_session_starts_without_waiting_for_speech() -> None:
    harness = Harness()
    harness.flush()
    (start,) = harness.requests
    assert start.opening is not None
    assert len(start.audio) == 0


def test_keep_alive() -> None:
    harness = Harness()
    harness.core.keep_alive()
    harness.flush()
    assert [r.opening is not None for r in harness.requests] == [True, False]
    harness.speak([sample_speech(BLOCK_SAMPLES)])
    harness.core.keep_alive()
    harness.flush()
    assert [len(r.audio) for r in harness.requests] == [0, 0, BLOCK_SAMPLES, 0]
    assert not harness.requests[-1].end


def test_timestamps_and_times() -> None:
    harness = Harness(lookahead=6)
    harness.speak([sample_speech(100)])  # at 100 s
    harness.clock.now_s = 110
    harness.speak([sample_speech(BLOCK_SAMPLES)])
    harness.clock.now_s = 120
    harness.end()
    first, second = harness.blocks()
    assert first.timestamps_s[:2] == (0.0, 1 / 25)
    assert len(first) == 6
    assert (first.audio_started_at_s, first.audio_complete_at_s) == (100, 110)
    assert (second.audio_started_at_s, second.audio_complete_at_s) == (110, 110)
    assert second.received_at_s >= second.sent_at_s == 120
    assert [(b.first_frame, len(b)) for b in (first, second)] == [(0, 6), (6, 7)]


def test_empty_chunks_are_fine() -> None:
    harness = Harness()
    harness.speak([np.zeros(0, np.int16), sample_speech(640), np.zeros(0, np.float32)])
    harness.end()
    assert sum(map(len, harness.blocks())) == 1


def test_a_chunk_may_be_changed_after_sending() -> None:
    cutter = BlockCutter()
    chunk = sample_speech(BLOCK_SAMPLES + 5)
    kept = chunk.copy()
    blocks = cutter.add(chunk, 0.0)
    chunk[:] = 0
    blocks += cutter.finish()
    assert np.array_equal(np.concatenate([b.samples for b in blocks])[: len(kept)], kept)


def test_no_speech_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"0 samples, so there is nothing to say; send\(\) some first"):
        Harness().core.end()


def test_sending_after_the_end_is_refused() -> None:
    harness = Harness()
    harness.speak([sample_speech(10)])
    harness.end()
    harness.core.end()
    with pytest.raises(SessionClosed, match=r"has ended with end\(\); open a new session"):
        harness.speak([sample_speech(10)])


def test_limits_hold_and_a_stuck_send_gives_up() -> None:
    harness = Harness(in_flight=3, unread=4)
    with pytest.raises(SendTimeout) as caught:
        harness.speak([sample_speech(10 * BLOCK_SAMPLES)])
    assert sum(len(r.audio) > 0 for r in harness.requests) == 4
    assert str(caught.value).startswith(
        "no block could be sent for 5 s: 0 of at most 3 blocks are sent but unanswered, and 4 of at most 4 "
        "are answered but unread; read blocks from another thread or task"
    )
    harness.end()  # what was taken is kept, and goes out as blocks are read
    assert sum(map(len, harness.blocks())) == 120


def test_in_flight_limit() -> None:
    harness = Harness(in_flight=3)
    harness.hold = True
    with pytest.raises(SendTimeout, match="3 of at most 3 blocks are sent but unanswered, and 0 of at most"):
        harness.speak([sample_speech(10 * BLOCK_SAMPLES)])


def test_a_silent_server_fails_the_session() -> None:
    harness = Harness()
    harness.hold = True
    harness.speak([sample_speech(BLOCK_SAMPLES)])
    steps = harness.core.next_block()
    assert next(steps) == harness.clock.now_s + 60 - 1
    harness.clock.now_s += 60
    with pytest.raises(AnswerTimeout, match="answered nothing for 60 s, with 1 blocks sent; check"):
        next(steps)
    harness.flush()
    assert harness.requests[-1].end


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (ErrorCode.UNAVAILABLE, SessionRefused),
        (ErrorCode.INVALID_ARGUMENT, SessionRefused),
        (ErrorCode.FAILED, SessionFailed),
    ],
)
def test_an_error_ends_the_sequence(code: ErrorCode, error: type[SessionRefused]) -> None:
    harness = Harness()
    harness.hold = True
    harness.speak([sample_speech(BLOCK_SAMPLES)])
    harness.core.receive_error(f"in ensemble 'live_avatar', [request id: 1] [{code}] sorry; go home")
    harness.flush()
    assert [(len(r.audio), r.end) for r in harness.requests] == [(0, False), (BLOCK_SAMPLES, False), (0, True)]
    with pytest.raises(error, match=r"^the server (refused|ended) the session: sorry; go home$") as caught:
        harness.blocks()
    assert caught.value.code is code
    with pytest.raises(error):
        harness.speak([sample_speech(1)])


def test_a_late_refusal_is_a_failure() -> None:
    harness = Harness()
    harness.speak([sample_speech(BLOCK_SAMPLES)])
    harness.core.receive_error("[UNAVAILABLE] the node goes down")
    steps = harness.core.next_block()
    with pytest.raises(StopIteration):  # the block that came before the error is still given
        next(steps)
    with pytest.raises(SessionFailed, match="the node goes down"):
        harness.blocks()


@pytest.mark.parametrize(
    ("frames", "first", "message"),
    [
        (11, 0, "answered a block with 11 raw frames, expected 12"),
        (12, 1, "FIRST_FRAME 1, expected 0 or less"),
    ],
)
def test_a_wrong_first_answer(frames: int, first: int, message: str) -> None:
    harness = Harness()
    harness.flush()
    harness.hold = True
    harness.speak([sample_speech(BLOCK_SAMPLES)])
    with pytest.raises(ServerIncompatible, match=message):
        harness.core.receive(Response(np.zeros((frames, 2, 2, 3), np.uint8), (), first))


def test_a_gap_and_an_answer_to_nothing() -> None:
    harness = Harness()
    harness.speak([sample_speech(BLOCK_SAMPLES)])
    with pytest.raises(ServerIncompatible, match="an answer that belongs to no request"):
        harness.core.receive(harness.response(1))
    harness.hold = True
    harness.speak([sample_speech(BLOCK_SAMPLES)])
    with pytest.raises(ServerIncompatible, match="FIRST_FRAME 24, expected 12"):
        harness.core.receive(harness.response(1))


def test_float_samples() -> None:
    pcm = np.array([0.0, 0.5, -0.5, 1.0, -1.0, 7.0, -7.0], np.float32)
    assert as_samples(pcm).tolist() == [0, 16384, -16384, 32767, -32768, 32767, -32768]


@pytest.mark.parametrize(
    ("pcm", "message"),
    [
        (b"\0\0", r"pcm is a bytes; pass a numpy array, for raw bytes np.frombuffer\(pcm, '<i2'\)"),
        ([1, 2], "pcm is a list; pass a numpy array"),
        (np.zeros((5, 2), np.int16), r"the shape \(5, 2\); pass one dimension of mono samples at 16 kHz"),
        (np.zeros(5), "the type float64; pass int16, or float32"),
        (np.zeros(5, ">i2"), "the type >i2; pass int16"),
        (np.array([0, np.nan], np.float32), "sample 1 of pcm is nan; pass finite values"),
        (np.array([np.inf], np.float32), "sample 0 of pcm is inf; pass finite values"),
    ],
)
def test_bad_samples(pcm: object, message: str) -> None:
    harness = Harness()
    with pytest.raises(InvalidInput, match=message):
        harness.speak([pcm])
    harness.speak([sample_speech(640)])  # a refused chunk leaves the session as it was
    harness.end()
    assert sum(map(len, harness.blocks())) == 1
