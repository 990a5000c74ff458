"""Speech and phoneme times from espeak-ng: order, determinism, and what is refused."""
# ruff: noqa: RUF001 - the letters of the IPA are meant

import multiprocessing

import numpy as np
import pytest

from live_avatar_client.errors import InvalidInput
from live_avatar_client.espeak import Voice, resample, speak

TEXT = "Bob bumped a purple mop."


def spoken_bytes(voice: str) -> bytes:
    return bytes(speak(TEXT, Voice(voice)).speech.tobytes())


def test_phonemes_are_in_order_without_gaps_and_inside_the_sound():
    spoken = speak("Hello there. My name is Tom!", Voice("en-us+f2", rate_wpm=160, tract=1.1))
    phonemes = spoken.phonemes
    assert all(one.start_s < one.end_s for one in phonemes)
    assert [one.end_s for one in phonemes[:-1]] == [one.start_s for one in phonemes[1:]]
    assert phonemes[0].start_s >= 0
    assert phonemes[-1].end_s <= len(spoken.speech) / 16_000
    assert "".join(one.ipa for one in phonemes).startswith("həlˈoʊ")


def test_phonemes_begin_where_they_sound():
    spoken = speak("ah, ah.", Voice("en-us"))
    pause = next(one for one in spoken.phonemes if not one.ipa and one.end_s - one.start_s > 0.1)
    vowel = next(one for one in spoken.phonemes if "ɑ" in one.ipa)

    def rms(start_s: float, end_s: float) -> float:
        part = spoken.speech[round(start_s * 16_000) : round(end_s * 16_000)].astype(float)
        return float(np.sqrt(np.square(part).mean()))

    assert rms(vowel.start_s, vowel.end_s) > 1000
    assert rms(pause.start_s + 0.01, pause.end_s - 0.01) < 50


def test_the_same_request_is_the_same_sound_whatever_was_spoken_before():
    first = spoken_bytes("en-us+f2")  # a voice with breath noise
    speak("Something else, by someone else.", Voice("en+m3", pitch=80))
    assert spoken_bytes("en-us+f2") == first


def test_another_process_speaks_the_same():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (other,) = pool.map(spoken_bytes, ["en-us+f2"])
    assert other == spoken_bytes("en-us+f2")


def test_a_longer_tract_lowers_the_voice_and_keeps_the_tempo():
    def bass(tract: float) -> tuple[float, int]:
        speech = speak(TEXT, Voice("en-us", tract=tract)).speech.astype(float)
        power = np.abs(np.fft.rfft(speech)) ** 2
        frequencies = np.fft.rfftfreq(len(speech), 1 / 16_000)
        return float((power * frequencies).sum() / power.sum()), len(speech)

    (short, short_length), (long, long_length) = bass(0.9), bass(1.2)
    assert long < 0.85 * short
    assert abs(long_length / short_length - 1) < 0.1


def test_resampling_keeps_a_tone_below_the_cut_and_drops_one_above():
    time_s = np.arange(44_100) / 44_100
    low, high = (np.rint(10_000 * np.sin(2 * np.pi * hz * time_s)).astype(np.int16) for hz in (1_000, 9_000))
    kept = resample(low, 44_100, 16_000)
    expected = 10_000 * np.sin(2 * np.pi * 1_000 * np.arange(16_000) / 16_000)
    assert kept.shape == (16_000,)
    np.testing.assert_allclose(kept, expected, atol=2)
    assert np.abs(resample(high, 44_100, 16_000)).max() <= 2


@pytest.mark.parametrize("name", ["nope", "en-us+nope", "en-us+../../voices"])
def test_an_unknown_voice_is_refused_by_name(name):
    with pytest.raises(InvalidInput, match=r"has no voice '.*nope'|has no voice '.*voices'; give a language"):
        speak("hello", Voice(name))


@pytest.mark.parametrize(
    ("text", "voice", "sentence"),
    [
        ("  ", Voice("en-us"), "the text to speak is '  '; give at least one word"),
        ("hi", Voice("en-us", rate_wpm=20), "rate 20 is outside 80..450 words per minute"),
        ("hi", Voice("en-us", pitch=100), "pitch 100 is outside 0..99"),
        ("hi", Voice("en-us", tract=3.0), r"tract 3.0 is outside 0.5..2.0; 1 leaves the voice as it is"),
    ],
)
def test_values_out_of_range_are_refused(text, voice, sentence):
    with pytest.raises(InvalidInput, match=sentence):
        speak(text, voice)
