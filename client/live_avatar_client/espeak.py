"""Speech and the times of its phonemes, from espeak-ng by ctypes; library and data come with `espeakng_loader`.

espeak-ng keeps synthesis state between texts (phases, noise, pitch flutter), in static variables that no call resets.
So each request loads a new copy of the library, in about 2 ms. The same request then gives the same sound in every
process and order.
"""

from __future__ import annotations

import _ctypes
import ctypes
import itertools
import math
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

try:
    import espeakng_loader  # type: ignore[import-untyped]
except ImportError as error:
    raise ImportError(
        "live_avatar_client.espeak needs espeakng-loader; install it with: pip install 'live-avatar-client[web]'"
    ) from error

from .cutter import Samples
from .errors import InvalidInput
from .protocol import SAMPLE_RATE_HZ

RATES_WPM = range(80, 451)
PITCHES = range(100)
TRACTS = (0.5, 2.0)

_LOCK = threading.Lock()
_SYNCHRONOUS = 2
_PHONEME_EVENTS, _AS_IPA, _NO_EXIT = 0x1, 0x2, 0x8000
_RATE, _PITCH = 1, 3
_BY_CHARACTER, _UTF8 = 1, 1
_NO_EVENT, _PHONEME = 0, 7
_OK = 0
_NOISE_SEED = 1  # seed of breath and hiss; otherwise it is the clock
_HZ_STEP = 50  # multiples of this rate have a short common period with 16 kHz


@dataclass(frozen=True)
class Phoneme:
    """From start_s to end_s of the sound: an IPA symbol with its marks, or "" for a pause."""

    ipa: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Spoken:
    """speech int16 [S], 16 kHz mono; the phonemes in order, without gaps, all inside the sound."""

    speech: Samples
    phonemes: tuple[Phoneme, ...]


@dataclass(frozen=True)
class Voice:
    """A speaker. name: language and variant, such as "en-us+f2".

    tract: factor of the vocal tract's length; 1.1 lowers pitch and formants by a tenth and keeps the tempo.
    """

    name: str
    rate_wpm: int = 175
    pitch: int = 50
    tract: float = 1.0


def speak(text: str, voice: Voice) -> Spoken:
    """Reads `text` aloud. Raises InvalidInput for an unknown voice, a rate or pitch out of range, an empty text."""
    _check(text, voice)
    with _LOCK, _fresh_library() as library:
        native_hz = _initialise(library)
        _choose(library, voice)
        sound, starts = _synthesise(library, text)
    source_hz = _HZ_STEP * round(native_hz / voice.tract / _HZ_STEP)
    return Spoken(resample(sound, source_hz, SAMPLE_RATE_HZ), _phonemes(starts, len(sound), source_hz))


def resample(sound: Samples, source_hz: int, target_hz: int) -> Samples:
    """int16 [n] at source_hz -> int16 [ceil(n target_hz / source_hz)], by cutting or padding its spectrum: no delay."""
    period = source_hz // math.gcd(source_hz, target_hz)
    padded = np.pad(sound.astype(np.float64), (0, -len(sound) % period))
    count = len(padded) * target_hz // source_hz
    resampled = np.fft.irfft(np.fft.rfft(padded)[: count // 2 + 1], count) * (count / len(padded))
    kept = -(-len(sound) * target_hz // source_hz)
    rounded: Samples = np.clip(np.rint(resampled[:kept]), -32768, 32767).astype(np.int16)
    return rounded


def _check(text: str, voice: Voice) -> None:
    if not text.strip():
        raise InvalidInput(f"the text to speak is {text!r}; give at least one word")
    if voice.rate_wpm not in RATES_WPM:
        raise InvalidInput(f"rate {voice.rate_wpm} is outside {RATES_WPM[0]}..{RATES_WPM[-1]} words per minute")
    if voice.pitch not in PITCHES:
        raise InvalidInput(f"pitch {voice.pitch} is outside {PITCHES[0]}..{PITCHES[-1]}")
    if not TRACTS[0] <= voice.tract <= TRACTS[1]:
        raise InvalidInput(f"tract {voice.tract} is outside {TRACTS[0]}..{TRACTS[1]}; 1 leaves the voice as it is")


@contextmanager
def _fresh_library() -> Iterator[ctypes.CDLL]:
    """A copy of the library in its first state; unloading it resets the static variables."""
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    try:
        yield library
    finally:
        library.espeak_Terminate()
        _ctypes.dlclose(library._handle)


def _initialise(library: ctypes.CDLL) -> int:
    """Loads the phoneme data and returns the synthesis rate in Hz."""
    data = espeakng_loader.get_data_path()
    rate_hz = int(library.espeak_Initialize(_SYNCHRONOUS, 0, data.encode(), _PHONEME_EVENTS | _AS_IPA | _NO_EXIT))
    if rate_hz <= 0:
        raise InvalidInput(f"espeak-ng cannot read its data in {data}; install `espeakng-loader` again")
    library.espeak_ng_SetRandSeed(_NOISE_SEED)
    return rate_hz


def _choose(library: ctypes.CDLL, voice: Voice) -> None:
    """Sets the voice. It checks for the variant's file, because espeak-ng ignores unknown variants."""
    variant = voice.name.partition("+")[2]
    missing = variant and not (Path(espeakng_loader.get_data_path()) / "voices" / "!v" / variant).is_file()
    if missing or library.espeak_SetVoiceByName(voice.name.encode()) != _OK:
        raise InvalidInput(
            f"espeak-ng has no voice {voice.name!r}; give a language and a variant of it, such as 'en-us+f2' "
            "(`espeak-ng --voices` and `espeak-ng --voices=variant` list them)"
        )
    library.espeak_SetParameter(_RATE, round(voice.rate_wpm * voice.tract), 0)
    library.espeak_SetParameter(_PITCH, voice.pitch, 0)


class _Name(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    """`espeak_EVENT` of speak_lib.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position_ms", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Name),
    )


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


def _synthesise(library: ctypes.CDLL, text: str) -> tuple[Samples, list[tuple[str, int]]]:
    """Sound int16 [n] at the library's rate, and the phonemes with their first samples."""
    chunks = [np.zeros(0, np.int16)]
    starts: list[tuple[str, int]] = []

    def collect(samples: Any, count: int, events: Any) -> int:
        if samples and count:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        for event in itertools.takewhile(lambda event: event.type != _NO_EVENT, events):
            if event.type == _PHONEME:
                starts.append((event.id.string.decode(), event.sample))
        return 0

    callback = _Callback(collect)
    library.espeak_SetSynthCallback(callback)
    spoken = ctypes.create_string_buffer(text.encode())
    if library.espeak_Synth(spoken, ctypes.c_size_t(len(spoken)), 0, _BY_CHARACTER, 0, _UTF8, None, None) != _OK:
        raise InvalidInput(f"espeak-ng could not read {text[:60]!r} aloud; give plain sentences")
    return np.concatenate(chunks), starts


def _phonemes(starts: list[tuple[str, int]], count: int, source_hz: int) -> tuple[Phoneme, ...]:
    """Each phoneme lasts until the next begins. Phonemes of no duration and marks such as "(en)" are dropped."""
    heard = [(name, start) for name, start in starts if not name.startswith("(")]
    ends = [start for _, start in heard[1:]] + [count]
    return tuple(
        Phoneme(name, start / source_hz, end / source_hz)
        for (name, start), end in zip(heard, ends, strict=True)
        if end > start
    )


def main() -> None:
    """Read a text on standard input and write its speech, int16 at 16 kHz, to standard output; argument: the voice."""
    try:
        speech = speak(sys.stdin.buffer.read().decode(errors="replace"), Voice(sys.argv[1])).speech
    except InvalidInput as error:
        sys.exit(str(error))
    sys.stdout.buffer.write(speech.astype("<i2").tobytes())


if __name__ == "__main__":
    main()
