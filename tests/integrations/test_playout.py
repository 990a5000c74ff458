"""Speech becomes blocks for the server and sound for the player, which belong together to the sample."""

from __future__ import annotations

import re

import numpy as np
import pytest
import soxr

from live_avatar_client import Block, InvalidInput
from live_avatar_client.pacing import SPEECH_GAP_S
from live_avatar_client.playout import Mark, Playout, Tick, mono
from live_avatar_client.protocol import FPS, FRAMES_PER_BLOCK, SAMPLES_PER_FRAME
from tests.integrations.players import Samples, chunks, speech

DITHER = 2
"""What soxr adds to int16, in steps."""


def resampled(samples: Samples, rate_hz: int, wanted_hz: int) -> Samples:
    whole: Samples = samples if rate_hz == wanted_hz else soxr.resample(samples, rate_hz, wanted_hz)
    return whole


def block(first_frame: int, latency_s: float = 0.1) -> Block:
    """An answer whose frames say their numbers, modulo 256."""
    numbers = (np.arange(first_frame, first_frame + FRAMES_PER_BLOCK) % 256).astype(np.uint8)
    frames = np.broadcast_to(numbers[:, None, None, None], (FRAMES_PER_BLOCK, 2, 2, 3))
    return Block(0, first_frame, frames, (), np.zeros(0, np.int16), False, 0, 0, 0, latency_s)


class Server:
    """Answers what a playout asks for, and remembers what it heard."""

    def __init__(self, playout: Playout) -> None:
        self._playout = playout
        self.heard: list[Samples] = []

    def answer(self, now_s: float = 1_000.0) -> int:
        """Answer all blocks that are wanted now; return how many."""
        before = len(self.heard)
        while wanted := self._playout.next_block(now_s):
            self._playout.sent(wanted)
            self.heard.append(wanted.speech)
        for number in range(before, len(self.heard)):
            self._playout.receive(block(number * FRAMES_PER_BLOCK))
        return len(self.heard) - before


def played(playout: Playout, server: Server) -> list[Tick | Mark]:
    """Everything until nothing is left to say."""
    items: list[Tick | Mark] = []
    while playout.is_speaking:
        server.answer()
        item = playout.next_item()
        assert item is not None
        items.append(item)
    return items


@pytest.mark.parametrize("sound_rate_hz", [16_000, 24_000, 48_000])
@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 16_000, 22_050, 24_000, 44_100, 48_000])
def test_sound_and_speech_stay_together_at_every_rate(rate_hz: int, sound_rate_hz: int):
    original = speech(1.37, rate_hz)
    playout = Playout(sound_rate_hz)
    server = Server(playout)
    for chunk in chunks(original):
        playout.push(chunk, rate_hz, 0.0)
    playout.finish()
    ticks = [item for item in played(playout, server) if isinstance(item, Tick)]
    spoken = [index for index, tick in enumerate(ticks) if tick.sound is not None]
    assert spoken == list(range(spoken[0], spoken[0] + 35))  # 1.37 s in frames of 40 ms, without a gap
    sound = np.concatenate([ticks[index].sound for index in spoken])
    np.testing.assert_allclose(sound, resampled(original, rate_hz, sound_rate_hz), atol=DITHER)
    heard = np.concatenate(server.heard)[spoken[0] * SAMPLES_PER_FRAME :][: 35 * SAMPLES_PER_FRAME]
    expected = resampled(original, rate_hz, 16_000)
    np.testing.assert_allclose(heard, np.pad(expected, (0, len(heard) - len(expected))), atol=DITHER)
    assert [int(tick.pixels[0, 0, 0]) for tick in ticks] == list(range(len(ticks)))


def test_a_mark_follows_the_speech_before_it():
    playout = Playout(16_000)
    server = Server(playout)
    playout.push(np.ones(3 * SAMPLES_PER_FRAME, np.int16), 16_000, 0.0)
    playout.mark("words")
    playout.push(np.ones(SAMPLES_PER_FRAME + 1, np.int16), 16_000, 0.0)
    playout.finish()
    playout.mark("end")
    items = [item for item in played(playout, server) if isinstance(item, Mark) or item.sound is not None]
    assert [item.content if isinstance(item, Mark) else len(item.sound) for item in items] == [
        *[640] * 3,
        "words",
        640,
        1,
        "end",
    ]


def test_a_pause_in_the_speech_lets_the_avatar_move_and_splits_no_word():
    playout = Playout(16_000)
    server = Server(playout)
    server.answer()
    while playout.next_item():
        pass
    playout.push(np.ones(1_000, np.int16), 16_000, 10.0)
    assert server.answer(10.0 + SPEECH_GAP_S - 0.01) == 0  # more of it may come
    assert server.answer(10.0 + SPEECH_GAP_S) > 0
    assert np.count_nonzero(np.concatenate(server.heard)) == 1_000
    sounds = []
    while item := playout.next_item():
        sounds.append(item.sound)
    assert [len(sound) for sound in sounds if sound is not None] == [640, 360]


def test_an_interruption_drops_what_was_asked_for_and_goes_on_with_the_next_frame():
    playout = Playout(16_000)
    server = Server(playout)
    playout.push(np.ones(30_000, np.int16), 16_000, 0.0)
    playout.mark("end")
    server.answer()
    for _ in range(5):
        playout.next_item()
    assert [mark.content for mark in playout.interrupt()] == ["end"]
    assert not playout.is_speaking
    asked = len(server.heard) * FRAMES_PER_BLOCK
    assert playout.next_item() is None
    server.answer()
    tick = playout.next_item()
    assert isinstance(tick, Tick)
    assert (int(tick.pixels[0, 0, 0]), tick.sound) == (asked % 256, None)


def test_frames_of_an_interrupted_speech_that_come_late_are_not_shown():
    playout = Playout(16_000)
    wanted = []
    playout.push(np.ones(30_000, np.int16), 16_000, 0.0)
    while next_block := playout.next_block(0.0):
        playout.sent(next_block)
        wanted.append(next_block)
    playout.interrupt()
    for number in range(len(wanted)):
        playout.receive(block(number * FRAMES_PER_BLOCK))
    assert playout.next_item() is None
    silent = playout.next_block(0.0)
    assert silent is not None
    assert not silent.speech.any()
    playout.sent(silent)
    playout.receive(block(len(wanted) * FRAMES_PER_BLOCK))
    tick = playout.next_item()
    assert isinstance(tick, Tick)
    assert int(tick.pixels[0, 0, 0]) == len(wanted) * FRAMES_PER_BLOCK


def test_an_interruption_while_nobody_speaks_does_not_stop_the_picture():
    playout = Playout(16_000)
    server = Server(playout)
    server.answer()
    assert playout.interrupt() == []
    assert isinstance(playout.next_item(), Tick)


def test_the_server_is_asked_for_little_more_than_is_played():
    """An interruption waits for all that was asked for."""
    playout = Playout(16_000)
    server = Server(playout)
    playout.push(np.ones(60 * 16_000, np.int16), 16_000, 0.0)
    for _ in range(20 * FPS):
        server.answer()
        assert playout.next_item()
    assert len(server.heard) * FRAMES_PER_BLOCK - 20 * FPS <= 3 * FRAMES_PER_BLOCK


def test_a_player_that_stands_still_has_nothing_to_catch_up_with():
    playout = Playout(16_000)
    server = Server(playout)
    server.answer()
    assert [server.answer(now_s=2_000.0 + hour * 3_600) for hour in range(3)] == [0, 0, 0]


def test_speech_goes_on_without_pictures_when_the_session_has_failed():
    playout = Playout(16_000)
    server = Server(playout)
    playout.push(np.ones(10_000, np.int16), 16_000, 0.0)
    server.answer()
    first = playout.next_item()
    playout.fail()
    playout.push(np.ones(10_000, np.int16), 16_000, 0.0)
    playout.finish()
    playout.mark("end")
    items = played(playout, server)
    assert all(item.pixels is None for item in items if isinstance(item, Tick))
    sounds = [first, *items[:-1]]
    assert sum(len(tick.sound) for tick in sounds if tick.sound is not None) == 20_000
    assert isinstance(items[-1], Mark)
    assert playout.next_block(9_999.0) is None


@pytest.mark.parametrize("rate_hz", [0, -1, 3_999, 10**9])
def test_a_rate_that_no_speech_has_is_refused(rate_hz: int):
    with pytest.raises(InvalidInput, match=re.escape(f"a rate of {rate_hz} Hz; pass 4000 to 768000 Hz")):
        Playout(16_000).push(np.ones(10, np.int16), rate_hz, 0.0)


def test_a_sound_rate_without_whole_frames_is_refused():
    with pytest.raises(InvalidInput, match=r"the sound's rate is 16001 Hz; pass a multiple of 25, such as"):
        Playout(16_001)


def test_channels_are_mixed_and_odd_bytes_refused():
    assert list(mono(np.array([10, 20, -30, -10], np.int16).tobytes(), 2)) == [15, -20]
    with pytest.raises(InvalidInput, match="the audio has 3 bytes in 1 channels; pass int16 samples, 2 bytes for"):
        mono(b"abc", 1)
    with pytest.raises(InvalidInput, match="the audio has 4 bytes in 0 channels"):
        mono(b"abcd", 0)
