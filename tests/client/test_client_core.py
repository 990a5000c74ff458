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
    ConnectionLost,
    InvalidInput,
    SendTimeout,
    ServerIncompatible,
    SessionBusy,
    SessionClosed,
    SessionFailed,
    SessionRefused,
)
from live_avatar_client.core import Limits, SessionCore, Steps
from live_avatar_client.cutter import BlockCutter, Samples, as_samples
from live_avatar_client.messages import Opening, Request, Response
from live_avatar_client.protocol import BLOCK_SAMPLES, EndReason, ErrorCode, FrameFormat
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
        keep_alive_s: float = math.inf,
        idle: bool = False,
        frames_per_response: int = FPB,
    ) -> None:
        self.clock = Clock()
        limits = Limits(in_flight, unread, send_timeout_s=5, answer_timeout_s=60, keep_alive_s=keep_alive_s)
        opening = Opening(SAMPLE_IMAGE, "hi", 3, frame_format, frames_per_response=frames_per_response)
        self.frames_per_response = frames_per_response
        self.core = SessionCore(opening, limits, self.clock, idle=idle)
        self.core.open()
        self.lookahead = lookahead
        self.hold = False
        self.requests: list[Request] = []
        self.sent_at_s: list[float] = []
        self.answered = 0
        self.blocks_answered = 0

    def flush(self) -> None:
        self.take_requests()
        if not self.hold:
            self.answer()

    def take_requests(self) -> None:
        while request := self.core.next_request():
            self.requests.append(request)
            self.sent_at_s.append(self.clock.now_s)

    def answer(self) -> None:
        while self.answered < len(self.requests):
            request = self.requests[self.answered]
            self.answered += 1
            for response in self.responses(len(request.audio)):
                self.core.receive(response)
            self.take_requests()

    def pass_time(self, seconds: float) -> list[float]:
        """Let the clock run, as the transports' timer does; return the times at which it wakes next, if any."""
        stop_s = self.clock.now_s + seconds
        while wake_s := next(self.core.keep_time(), None):
            assert wake_s > self.clock.now_s, "the timer spins"
            if wake_s > stop_s:
                break
            self.clock.now_s = wake_s
            self.flush()
        self.clock.now_s = stop_s
        return [] if wake_s is None else [wake_s]

    @property
    def audio(self) -> list[Samples]:
        return [request.audio for request in self.requests if len(request.audio)]

    def responses(self, samples: int) -> list[Response]:
        if not samples:
            return [_response(0, 0)]
        first = self.blocks_answered * FPB - self.lookahead
        self.blocks_answered += 1
        count = self.frames_per_response
        return [_response(start, count) for start in range(first, first + FPB, count)]

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
        """Read to the end."""
        blocks = self.blocks_so_far()
        assert self.core.is_complete, "the core waits although everything was answered"
        return blocks

    def blocks_so_far(self) -> list[Block]:
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
                return blocks


def _response(first: int, count: int) -> Response:
    frames = np.zeros((count, 2, 2, 3), np.uint8)
    frames[...] = np.arange(first, first + count).reshape(-1, 1, 1, 1) % 256
    return Response(frames, (), first)


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
    count=st.sampled_from([4, FPB]),
)
@settings(max_examples=80, deadline=None)
def test_every_frame_comes_once(sizes: list[int], lookahead: int, in_flight: int, held: bool, count: int) -> None:
    harness = Harness(lookahead, in_flight, frames_per_response=count)
    if held:  # nothing is answered before the end, so the look-ahead is not known at the end
        sizes = [min(sum(sizes), in_flight * BLOCK_SAMPLES)]
        harness.hold = True
    chunks = [sample_speech(size) for size in sizes]
    harness.speak(chunks)
    harness.end()
    harness.hold = False
    harness.flush()
    blocks = harness.blocks()
    frames = math.ceil(sum(sizes) / 640)
    spoken = np.pad(np.concatenate(chunks), (0, -sum(sizes) % 640))
    assert np.array_equal(np.concatenate([b.audio for b in blocks]), spoken)
    assert [len(b.audio) for b in blocks] == [640 * len(b) for b in blocks]
    assert not any(b.stale for b in blocks)
    assert [n for b in blocks for n in range(b.first_frame, b.first_frame + len(b))] == list(range(frames))
    assert [int(f[0, 0, 0]) for b in blocks for f in b.frames] == [n % 256 for n in range(frames)]
    assert [b.index for b in blocks] == list(range(len(blocks)))
    assert [r.end for r in harness.requests] == [None] * (len(harness.requests) - 1) + [EndReason.COMPLETED]
    assert [r.opening is not None for r in harness.requests] == [True] + [False] * (len(harness.requests) - 1)
    assert len({(r.sequence_id, r.token) for r in harness.requests}) == 1
    assert sum(len(r.audio) > 0 for r in harness.requests) == math.ceil((frames + lookahead) / FPB)


def test_the_first_frames_of_a_block_are_there_before_its_last() -> None:
    harness = Harness(unread=2, frames_per_response=4)
    harness.hold = True
    harness.speak([sample_speech(2 * BLOCK_SAMPLES)])
    harness.answered += 1  # START
    harness.core.receive(_response(0, 0))
    first, second, third = harness.responses(BLOCK_SAMPLES)
    harness.core.receive(first)
    (block,) = harness.blocks_so_far()
    assert (block.index, block.first_frame, len(block), block.audio.size) == (0, 0, 4, 4 * 640)
    harness.core.receive(second)
    with pytest.raises(ServerIncompatible, match="FIRST_FRAME 12, expected 8"):
        harness.core.receive(_response(12, 4))
    harness.core.receive(third)
    assert [block.first_frame for block in harness.blocks_so_far()] == [4, 8]


def test_what_is_unread_counts_in_blocks_whatever_the_responses() -> None:
    harness = Harness(unread=2, in_flight=8, frames_per_response=4)
    harness.run(harness.core.send(sample_speech(2 * BLOCK_SAMPLES)))
    with pytest.raises(SessionBusy, match="2 of at most 2 are answered but unread"):
        next(harness.core.send(sample_speech(BLOCK_SAMPLES), wait=False), None)


def test_an_error_after_the_first_frames_is_no_refusal() -> None:
    harness = Harness(frames_per_response=4)
    harness.hold = True
    harness.speak([sample_speech(BLOCK_SAMPLES)])
    harness.core.receive(_response(0, 0))
    harness.core.receive(_response(0, 4))
    harness.core.receive_error("[UNAVAILABLE] the server is going away")
    next(harness.core.next_block(), None)
    with pytest.raises(SessionFailed, match="the server ended the session: the server is going away"):
        next(harness.core.next_block())


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
    assert [r.opening is not None for r in harness.requests] == [True]  # which says it too
    harness.speak([sample_speech(BLOCK_SAMPLES)])
    harness.core.keep_alive()
    harness.flush()
    assert [len(r.audio) for r in harness.requests] == [0, BLOCK_SAMPLES, 0]
    assert harness.requests[-1].end is None


def test_a_quiet_session_keeps_itself_alive() -> None:
    harness = Harness(keep_alive_s=10)
    harness.flush()
    (started_s,) = harness.pass_time(9.5)
    assert started_s == 100 + 10
    harness.pass_time(30.5)
    assert [len(r.audio) for r in harness.requests] == [0] * 5
    assert harness.sent_at_s == [100, 110, 120, 130, 140]
    harness.speak([sample_speech(BLOCK_SAMPLES)])
    assert harness.pass_time(0) == [harness.sent_at_s[-1] + 10]


def test_a_session_whose_reader_is_slow_keeps_itself_alive_too() -> None:
    harness = Harness(unread=1, keep_alive_s=10)
    with pytest.raises(SendTimeout):
        harness.speak([sample_speech(2 * BLOCK_SAMPLES)])
    harness.end()
    harness.pass_time(25)
    assert [len(r.audio) for r in harness.requests] == [0, BLOCK_SAMPLES, 0, 0, 0]  # it is 131 s now
    assert sum(map(len, harness.blocks())) == 24
    assert harness.pass_time(100) == []  # the end is sent: there is nothing to keep alive


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


@pytest.mark.parametrize("lookahead", [0, 5, 12, 19])
def test_an_interrupt_drops_what_is_not_sent_and_marks_the_rest(lookahead: int) -> None:
    harness = Harness(lookahead, in_flight=3)
    old, new = sample_speech(10 * BLOCK_SAMPLES + 99), sample_speech(BLOCK_SAMPLES + 700)
    harness.speak([old[:BLOCK_SAMPLES]])
    before = harness.blocks_so_far()
    harness.speak([old[BLOCK_SAMPLES : 2 * BLOCK_SAMPLES]])  # answered, and not read
    harness.hold = True
    sender = harness.core.send(old[2 * BLOCK_SAMPLES :])
    next(sender)
    harness.flush()
    harness.core.interrupt()
    with pytest.raises(StopIteration):
        next(sender)  # who waits with a chunk is let go
    harness.flush()
    harness.hold = False
    harness.speak([new])
    harness.end()
    blocks = harness.blocks()
    assert len(harness.audio) == 5 + math.ceil((14 + lookahead) / FPB)
    assert np.array_equal(np.concatenate(harness.audio[5:])[: len(new)], new)
    everything = before + blocks
    assert not any(b.stale for b in before)
    assert [n for b in everything for n in range(b.first_frame, b.first_frame + len(b))] == list(range(5 * FPB + 14))
    assert [int(f[0, 0, 0]) for b in everything for f in b.frames] == list(range(5 * FPB + 14))
    assert all(b.stale == (b.first_frame + len(b) <= 5 * FPB) for b in blocks)
    assert all(b.stale or b.first_frame >= 5 * FPB for b in blocks)
    heard = np.concatenate([b.audio for b in everything])
    assert np.array_equal(heard[: 5 * BLOCK_SAMPLES], old[: 5 * BLOCK_SAMPLES])
    assert np.array_equal(heard[5 * BLOCK_SAMPLES :], np.pad(new, (0, -len(new) % 640)))
    assert [b.index for b in everything] == list(range(len(everything)))


def test_an_interrupt_before_anything_was_sent() -> None:
    harness = Harness()
    harness.speak([sample_speech(100)])
    harness.core.interrupt()
    harness.speak([sample_speech(700)])
    harness.end()
    (block,) = harness.blocks()
    assert (block.first_frame, len(block), block.stale) == (0, 2, False)
    assert np.array_equal(block.audio[:700], sample_speech(700))


def test_an_interrupt_after_which_nothing_is_said() -> None:
    harness = Harness()
    harness.speak([sample_speech(100)])
    harness.core.interrupt()
    harness.end()
    assert harness.blocks() == []
    assert [len(r.audio) for r in harness.requests] == [0, 0]
    assert harness.requests[-1].end is EndReason.COMPLETED
    with pytest.raises(SessionClosed, match=r"has ended with end\(\)"):
        harness.core.interrupt()


def test_an_idle_session_sends_silence_at_playback_pace() -> None:
    harness = Harness(idle=True)
    harness.flush()
    harness.pass_time(4.9)
    assert harness.sent_at_s[1:] == pytest.approx([100 + 0.48 * i for i in range(11)])
    assert not np.concatenate(harness.audio).any()
    (block, *_) = harness.blocks_so_far()
    assert not block.audio.any()
    assert len(block.audio) == BLOCK_SAMPLES


def test_speech_in_a_burst_is_played_before_there_is_silence() -> None:
    harness = Harness(idle=True)
    harness.flush()  # a block of silence, which is played until 100.48
    speech = sample_speech(3 * BLOCK_SAMPLES + 50)
    harness.speak([speech])
    began_s = harness.sent_at_s[2]
    harness.pass_time(3)
    assert harness.sent_at_s[2:5] == [began_s] * 3
    assert harness.sent_at_s[5:7] == pytest.approx([100 + 4 * 0.48, 100 + 5 * 0.48])
    sent = np.concatenate(harness.audio[1:])
    assert np.array_equal(sent[: len(speech)], speech)  # the rest of the speech goes with silence behind it
    assert not sent[len(speech) :].any()


def test_speech_that_is_just_being_spoken_begins_in_the_block_that_is_due() -> None:
    harness = Harness(idle=True)
    harness.flush()
    harness.pass_time(0.3)
    speech = sample_speech(4 * BLOCK_SAMPLES + 320)
    for chunk in np.split(speech, range(320, len(speech), 320)):
        harness.run(harness.core.send(chunk, wait=False))  # takes no time
        harness.pass_time(0.02)
    harness.pass_time(0.5)
    assert harness.sent_at_s[1:6] == pytest.approx([100 + 0.48 * i for i in range(5)], abs=0.021)  # no pause
    sent = np.concatenate(harness.audio)
    begin = np.flatnonzero(sent)[0] - np.flatnonzero(speech)[0]
    assert begin == pytest.approx(2 * BLOCK_SAMPLES - 0.18 * 16_000, abs=320)  # what was spoken until 100.48
    assert np.array_equal(sent[begin : begin + len(speech)], speech)  # and no silence between the chunks
    assert not sent[begin + len(speech) :].any()


def test_speech_that_comes_faster_than_it_is_spoken_begins_with_a_block() -> None:
    harness = Harness(idle=True)
    harness.flush()
    harness.pass_time(0.42)
    speech = sample_speech(2 * BLOCK_SAMPLES)
    for chunk in np.split(speech, range(1600, len(speech), 1600)):  # 0.1 s of speech every 0.03 s
        harness.run(harness.core.send(chunk, wait=False))
        harness.pass_time(0.03)
    sent = np.concatenate(harness.audio)
    assert not sent[:BLOCK_SAMPLES].any()
    assert np.array_equal(sent[BLOCK_SAMPLES:], speech)


def test_a_block_of_several_speakers_may_begin_with_silence() -> None:
    cutter, chunk = BlockCutter(2), np.stack([sample_speech(100), sample_speech(100)])
    cutter.add(chunk, 1.0)
    block = cutter.begin()
    assert block.samples.shape == (2, BLOCK_SAMPLES)
    assert np.array_equal(block.samples[:, -100:], chunk)
    assert not block.samples[:, :-100].any()
    assert block.speech_samples == BLOCK_SAMPLES
    assert cutter.live_at_s() == math.inf
    assert cutter.finish() == []


def test_a_late_timer_does_not_slow_playback_down() -> None:
    harness = Harness(idle=True, unread=2000)
    harness.flush()
    for _ in range(1000):
        (wake_s,) = harness.pass_time(0)
        harness.clock.now_s = wake_s + 0.01
        harness.flush()
    assert wake_s == pytest.approx(100 + 1000 * 0.48)
    harness.clock.now_s += 10  # a pause is not made up for
    harness.flush()
    assert harness.pass_time(0) == [harness.clock.now_s + 0.48]


def test_an_idle_session_stays_within_its_limits() -> None:
    harness = Harness(idle=True, unread=4, keep_alive_s=10)
    harness.flush()
    harness.pass_time(60)
    assert len(harness.audio) == 4
    assert sum(len(r.audio) == 0 for r in harness.requests) == 1 + 5  # it keeps itself alive instead
    assert len(harness.blocks_so_far()) == 4 + 1


def test_an_idle_video_ends_with_the_last_speech() -> None:
    harness = Harness(idle=True)
    harness.flush()
    harness.speak([sample_speech(BLOCK_SAMPLES + 1)])
    harness.pass_time(5)
    harness.end()
    blocks = harness.blocks()
    assert sum(map(len, blocks)) == 12 + 12 + 1
    assert sum(len(b.audio) for b in blocks) == 25 * 640
    assert harness.requests[-1].end is EndReason.COMPLETED


@pytest.mark.parametrize("lookahead", [0, 24])
def test_an_idle_session_may_say_nothing(lookahead: int) -> None:
    harness = Harness(lookahead, idle=True)
    harness.flush()
    harness.pass_time(1)
    harness.end()
    assert harness.blocks() == []
    assert harness.requests[-1].end is EndReason.COMPLETED


def test_an_interrupted_avatar_listens_unless_it_is_made_to_speak() -> None:
    harness = Harness(idle=True)
    harness.flush()
    harness.speak([sample_speech(8 * BLOCK_SAMPLES)])
    harness.core.interrupt()
    interrupted_s, sent = harness.clock.now_s, len(harness.audio)
    harness.flush()
    assert len(harness.audio) == sent, "the next block is for new speech, if it comes soon"
    assert harness.pass_time(0) == [interrupted_s + 0.24]
    harness.pass_time(0.25)
    assert len(harness.audio) == sent + 1
    assert not harness.audio[-1].any()


def test_a_busy_session_takes_nothing() -> None:
    harness = Harness(in_flight=2, unread=3)
    harness.flush()
    harness.run(harness.core.send(sample_speech(BLOCK_SAMPLES + 5), wait=False))
    harness.hold = True
    harness.run(harness.core.send(sample_speech(BLOCK_SAMPLES), wait=False))
    with pytest.raises(SessionBusy) as caught:
        harness.run(harness.core.send(sample_speech(2 * BLOCK_SAMPLES), wait=False))
    assert str(caught.value) == (
        "the chunk completes 2 blocks, and 1 can be sent now: 1 of at most 2 blocks are sent but unanswered, and 1 "
        "of at most 3 are answered but unread; read blocks and send it again, in smaller chunks if it never fits, "
        "or send with wait=True. Nothing was taken"
    )
    harness.hold = False
    harness.flush()
    harness.end()
    assert sum(len(b) for b in harness.blocks()) == 25
    assert len(harness.audio) == 3


def test_the_audio_of_a_long_session_is_not_kept() -> None:
    harness = Harness(lookahead=30)
    for _ in range(100):
        harness.speak([sample_speech(BLOCK_SAMPLES)])
        harness.blocks_so_far()
        assert len(harness.core._sent) <= 4


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
    assert harness.requests[-1].end is EndReason.FAILED


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
    ends = [(len(r.audio), r.end) for r in harness.requests]
    assert ends == [(0, None), (BLOCK_SAMPLES, None), (0, EndReason.FAILED)]
    with pytest.raises(error, match=r"^the server (refused|ended) the session: sorry; go home$") as caught:
        harness.blocks()
    assert caught.value.code is code
    with pytest.raises(error):
        harness.speak([sample_speech(1)])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionLost("gone"), EndReason.FAILED),
        (InvalidInput("bad chunk"), EndReason.FAILED),
        (SessionClosed("closed early"), EndReason.ABANDONED),
        (LookupError("the application's own"), EndReason.ABANDONED),
    ],
)
def test_the_server_is_told_why_a_session_ends(error: Exception, reason: EndReason) -> None:
    harness = Harness()
    harness.speak([sample_speech(BLOCK_SAMPLES)])
    harness.core.fail(error)
    harness.flush()
    assert [r.end for r in harness.requests] == [None, None, reason]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "in ensemble 'live_avatar', inference request for sequence 6 to model 'b' must specify the START "
            "flag on the first request of the sequence",
            "the server no longer knows this session (it was silent for longer than the server's idle limit, or the "
            "server has lost it); open a new session",
        ),
        (
            "in ensemble 'live_avatar', Stub process 'dit_step_2_0_0' is not healthy.",
            "the process of its stage dit_step_2 has stopped; open a new session when the server is ready",
        ),
        ("in ensemble 'live_avatar', out of luck", "out of luck"),
    ],
)
def test_errors_of_triton_itself(text: str, message: str) -> None:
    harness = Harness()
    harness.flush()
    harness.core.receive_error(text)
    with pytest.raises(SessionFailed) as caught:
        harness.blocks()
    assert str(caught.value) == f"the server ended the session: {message}"
    assert caught.value.code is None


def test_provenance_comes_with_the_first_answer() -> None:
    harness = Harness()
    harness.hold = True
    harness.flush()
    assert harness.core.provenance is None
    harness.core.receive(Response(np.zeros((0, 2, 2, 3), np.uint8), (), 0, {"seed": 3}))
    harness.answered += 1
    harness.hold = False
    harness.speak([sample_speech(BLOCK_SAMPLES)])
    assert harness.core.provenance == {"seed": 3}


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
        (12, 1, "FIRST_FRAME 1, expected -750 to 0"),
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
        harness.core.receive(harness.responses(1)[0])
    harness.hold = True
    harness.speak([sample_speech(BLOCK_SAMPLES)])
    with pytest.raises(ServerIncompatible, match="FIRST_FRAME 24, expected 12"):
        harness.core.receive(harness.responses(1)[0])


def test_float_samples() -> None:
    pcm = np.array([0.0, 0.5, -0.5, 1.0, -1.0, 7.0, -7.0], np.float32)
    assert as_samples(pcm).tolist() == [0, 16384, -16384, 32767, -32768, 32767, -32768]


@pytest.mark.parametrize("peak", [17, 128, 32_768, 2.0**31])
def test_float_samples_of_another_scale_are_refused(peak: float) -> None:
    pcm = (np.sin(np.arange(1000) / 10) * peak).astype(np.float32)
    with pytest.raises(
        InvalidInput, match=r"has values of up to [\d.e+]+ as float32; pass values in \[-1, 1\], or int16"
    ):
        as_samples(pcm)


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
