"""Texts, voices, visemes and utterances: what sounds and what the mouth does agree, and the splits share nothing."""
# ruff: noqa: RUF001 - the letters of the IPA are meant

import unicodedata
from itertools import combinations

import numpy as np
import pytest

from live_avatar_client.espeak import Phoneme, Voice, speak
from training.data.speech import NOISE_SHARE, SILENT_SHARE, make_utterance
from training.data.split import Part, Split, generator
from training.data.texts import VOCABULARIES, sentence
from training.data.visemes import REST_WIDTH, TABLE, VISEMES, hop_visemes, mouth_track, visemes_of
from training.data.voices import LANGUAGES, VARIANTS, draw_voice

PAIRS = list(combinations(Split, 2))
HOP = 160


def words_of(split: Split) -> set[str]:
    return {word.lower() for words in VOCABULARIES[split].words.values() for word in words}


def spoken_mouth(text: str, loudness: float = 1.0) -> np.ndarray:
    """Opening of the mouth over a text."""
    spoken = speak(text, Voice("en-us"))
    sound = np.pad(spoken.speech, (0, -len(spoken.speech) % (4 * HOP))) * loudness
    return mouth_track(hop_visemes(spoken.phonemes, len(sound) // HOP), sound)[0][:, 0]


def mouth_of(*phonemes: Phoneme, hops: int = 100) -> np.ndarray:
    """The track of phonemes at an even loudness."""
    return mouth_track(hop_visemes(phonemes, hops), np.ones(hops * HOP))[0]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_splits_share_no_words_patterns_numbers_or_variants(one, other):
    first, second = VOCABULARIES[one], VOCABULARIES[other]
    assert words_of(one) & words_of(other) == set()
    assert set(first.patterns) & set(second.patterns) == set()
    assert not set(range(*first.numbers)) & set(range(*second.numbers))
    assert not set(VARIANTS[one]) & set(VARIANTS[other])


def test_there_are_hundreds_of_words_to_train_on():
    assert len(words_of(Split.TRAIN)) > 300


@pytest.mark.parametrize("split", Split)
def test_every_pattern_can_be_filled_and_every_voice_exists(split):
    random = generator(split, 0, Part.SPEECH)
    said = [sentence(split, random) for _ in range(50)]
    assert all("{" not in text and "_" not in text for text in said)
    assert len(set(said)) > 40
    for language in LANGUAGES[split]:
        for variant in VARIANTS[split][:: len(LANGUAGES[split])]:
            assert len(speak("Hi", Voice(f"{language}+{variant}")).speech)
    assert {draw_voice(split, random).name.partition("+")[2] for _ in range(300)} == set(VARIANTS[split])


@pytest.mark.parametrize("split", Split)
def test_every_sound_of_the_texts_has_a_viseme(split):
    known = set("".join(viseme.symbols for viseme in TABLE))
    texts = [" ".join(words).replace("_", " ") for words in VOCABULARIES[split].words.values()]
    for language in LANGUAGES[split]:
        spoken = [speak(text, Voice(language, rate_wpm=450)) for text in texts]
        letters = {letter for one in spoken for phoneme in one.phonemes for letter in phoneme.ipa}
        strange = {one for one in letters - known if unicodedata.category(one) not in ("Lm", "Mn", "Po")}
        assert strange == set()  # stress, length and diacritics aside


def test_a_letter_belongs_to_one_viseme():
    symbols = "".join(viseme.symbols for viseme in TABLE)
    assert len(symbols) == len(set(symbols))


def test_diphthongs_and_affricates_have_two_shapes_and_a_pause_is_rest():
    names = {ipa: [VISEMES[index] for index in visemes_of(ipa)] for ipa in ("ˈaɪ", "tʃ", "", "ˈɑː")}
    assert names == {
        "ˈaɪ": ["open", "close spread"],
        "tʃ": ["tongue", "rounded consonant"],
        "": ["rest"],
        "ˈɑː": ["open"],
    }


def test_the_mouth_opens_for_ah_and_closes_for_m():
    opening = spoken_mouth("mama mama")
    assert opening.max() > 0.7
    assert opening[opening.argmax() :].min() < 0.15
    vowel, hum = mouth_of(Phoneme("ɑː", 0.2, 0.8)), mouth_of(Phoneme("m", 0.2, 0.8))
    assert vowel[10, 0] > 0.8
    assert hum[:, 0].max() == 0.0


def test_lips_are_round_for_oo_and_wide_for_ee():
    assert mouth_of(Phoneme("uː", 0.2, 0.8))[10, 1] < 0.1
    assert mouth_of(Phoneme("iː", 0.2, 0.8))[10, 1] > 0.9


def test_a_louder_vowel_opens_wider_and_the_level_of_the_recording_does_not_matter():
    visemes = hop_visemes([Phoneme("ɛ", 0.0, 1.0)], 100)
    loud = np.repeat([0.5, 1.5], 50 * HOP)
    opening = mouth_track(visemes, loud)[0][:, 0]
    assert opening[20] > 1.3 * opening[6]
    np.testing.assert_array_equal(mouth_track(visemes, loud * 1000)[0][:, 0], opening)


@pytest.mark.parametrize("ipa", ["ɑː", "p", "m"])
def test_no_frame_knows_a_phoneme_that_begins_40_ms_after_it(ipa):
    before = mouth_of(Phoneme("ə", 0.0, 0.4))
    after = mouth_of(Phoneme("ə", 0.0, 0.4), Phoneme(ipa, 0.4, 0.8))
    unchanged = np.arange(25) * 0.04 + 0.04 + 0.04 <= 0.4 + 1e-9
    np.testing.assert_array_equal(after[unchanged], before[unchanged])
    assert (after[~unchanged] != before[~unchanged]).any()


def test_no_frame_knows_how_loud_the_sound_is_40_ms_after_it():
    visemes = hop_visemes([Phoneme("ə", 0.0, 1.0)], 100)
    sound = np.ones(100 * HOP)
    swapped = sound.copy()
    swapped[50 * HOP : 60 * HOP], swapped[60 * HOP : 70 * HOP] = 2.0, 0.5
    other = sound.copy()
    other[50 * HOP : 60 * HOP], other[60 * HOP : 70 * HOP] = 0.5, 2.0
    first, second = (mouth_track(visemes, one)[0] for one in (swapped, other))  # of one mean loudness
    np.testing.assert_allclose(first[:11], second[:11], rtol=1e-6)
    assert (first[11:] != second[11:]).any()


@pytest.mark.parametrize("split", Split)
def test_an_utterance_is_a_pure_function_of_its_seed(split):
    first, again, other = (make_utterance(split, seed, 4) for seed in (3, 3, 4))
    for name in ("speech", "mouth", "viseme"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.speech, other.speech)


def test_an_utterance_has_the_length_and_types_asked_for():
    utterance = make_utterance(Split.TRAIN, 0, 3)
    assert (utterance.speech.dtype, utterance.speech.shape) == (np.int16, (3 * 7_680,))
    assert (utterance.mouth.dtype, utterance.mouth.shape) == (np.float32, (36, 2))
    assert (utterance.viseme.dtype, utterance.viseme.shape) == (np.int64, (36,))
    assert utterance.mouth.min() >= 0
    assert utterance.mouth.max() <= 1
    assert utterance.viseme.max() < len(VISEMES)


def test_the_mouth_is_shut_where_nobody_speaks():
    """The first number of an utterance says whether it is silent, noise or speech."""
    kinds = {seed: generator(Split.TRAIN, seed, Part.SPEECH).random() for seed in range(200)}
    silent = [make_utterance(Split.TRAIN, seed, 1) for seed, kind in kinds.items() if kind < SILENT_SHARE]
    noise = [
        make_utterance(Split.TRAIN, seed, 1)
        for seed, kind in kinds.items()
        if SILENT_SHARE <= kind < SILENT_SHARE + NOISE_SHARE
    ]
    assert silent
    assert noise
    assert not any(one.speech.any() for one in silent)
    assert all(one.speech.std() > 100 for one in noise)
    for one in silent + noise:
        assert not one.mouth[:, 0].any()
        assert not one.viseme.any()
        np.testing.assert_allclose(one.mouth[:, 1], REST_WIDTH, rtol=1e-6)


def test_most_utterances_speak():
    shut = sum(not make_utterance(Split.TEST, seed, 4).mouth[:, 0].any() for seed in range(40))
    assert shut / 40 < 3 * (SILENT_SHARE + NOISE_SHARE)
