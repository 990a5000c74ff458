"""The speakers in a picture: where each is, and whose speech a chunk is.

Speakers are counted from 0.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from .cutter import Samples, as_samples, silence
from .errors import InvalidInput, MediaError
from .files import require_file
from .protocol import MAX_MASK_BYTES

Box: TypeAlias = tuple[int, int, int, int]
_PNG_START: Final = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Speaker:
    """A person in the picture, who speaks what only this person says."""

    mask: bytes | str | os.PathLike[str] | Box
    """Where the person is: the bytes or the path of a PNG of the picture's size, light at the person, or a box
    (x, y, width, height) in the picture's pixels. The masks of two people may overlap."""


def mask_bytes(speakers: object) -> tuple[bytes, ...]:
    """Return the masks as they are sent; raise InvalidInput or MediaError for what is none."""
    if isinstance(speakers, (str, bytes)) or not isinstance(speakers, Sequence):
        raise InvalidInput(f"speakers is a {type(speakers).__name__}; pass a list of Speaker")
    if len(speakers) == 1:
        raise InvalidInput(
            "speakers has 1 speaker; pass two or more, or leave speakers out for a picture of one person"
        )
    return tuple(_mask(number, speaker) for number, speaker in enumerate(speakers))


def speech_of(pcm: object, speaker: int | None, speakers: int) -> Samples:
    """Return a chunk as int16 [samples], or [speakers, samples] of several speakers.

    `pcm` is the speech of `speaker`, or a mapping from speakers to their speech at the same time. Who is not named is
    silent, and shorter speech ends with silence.
    """
    if isinstance(pcm, Mapping):
        if speaker is not None:
            raise InvalidInput(f"pcm already names its speakers, and speaker is {speaker!r}; leave speaker out")
        named: Mapping[Any, object] = pcm
    elif speaker is None and speakers > 1:
        raise InvalidInput(
            f"the session has {speakers} speakers, and pcm is of none; pass speaker=0 to speaker={speakers - 1}, or "
            "a dict such as {0: pcm, 1: other}"
        )
    else:
        named = {0 if speaker is None else speaker: pcm}
    spoken = {_number(name, speakers): as_samples(speech) for name, speech in named.items()}
    if speakers == 1:
        return spoken.get(0, silence(0))
    chunk = silence(max((len(speech) for speech in spoken.values()), default=0), speakers)
    for number, speech in spoken.items():
        chunk[number, : len(speech)] = speech
    return chunk


def mixed(audio: Samples) -> Samples:
    """Return the speech of several speakers, int16 [speakers, samples], in one track [samples], clipped."""
    if audio.ndim == 1:
        return audio
    track: Samples = np.clip(audio.sum(axis=0, dtype=np.int32), -32768, 32767).astype(np.int16)
    return track


def _number(name: object, speakers: int) -> int:
    if isinstance(name, bool) or not isinstance(name, (int, np.integer)) or not 0 <= name < speakers:
        has = "one speaker, 0" if speakers == 1 else f"the speakers 0 to {speakers - 1}"
        raise InvalidInput(f"the session has no speaker {name!r}; it has {has}")
    return int(name)


def _mask(number: int, speaker: object) -> bytes:
    name = f"the mask of speaker {number}"
    if not isinstance(speaker, Speaker):
        raise InvalidInput(f"speaker {number} is a {type(speaker).__name__}; pass Speaker(mask=...)")
    mask: object = speaker.mask
    if isinstance(mask, tuple):
        return _box(name, mask)
    if isinstance(mask, (str, os.PathLike)):
        data = _read(name, Path(mask))
        if fault := _fault(data):
            raise MediaError(f"{name}, {os.fspath(mask)!r}, {fault}")
        return data
    if not isinstance(mask, bytes):
        raise InvalidInput(f"{name} is a {type(mask).__name__}; pass a PNG as bytes, its path, or a box")
    if fault := _fault(mask):
        raise InvalidInput(f"{name} {fault}")
    return mask


def _fault(data: bytes) -> str | None:
    if len(data) > MAX_MASK_BYTES:
        return f"has more than {MAX_MASK_BYTES} bytes, the limit; save it in grey, or pass a box"
    if not data.startswith(_PNG_START):
        return f"starts with {data[:8]!r}, which is no PNG; save it as a PNG, or pass a box"
    return None


def _read(name: str, path: Path) -> bytes:
    require_file(path, name.removeprefix("the "), "a PNG file, or a box (x, y, width, height)")
    try:
        with path.open("rb") as stream:
            return stream.read(MAX_MASK_BYTES + 1)
    except OSError as error:
        raise MediaError(f"{name} {str(path)!r} cannot be read: {error.strerror}; pass another file") from error


def _box(name: str, box: tuple[object, ...]) -> bytes:
    sides = [int(side) for side in box if isinstance(side, (int, np.integer)) and side >= 0]
    is_box = len(box) == len(sides) == 4
    if not is_box or 0 in sides[2:]:
        raise InvalidInput(f"{name} is the box {box!r}; pass (x, y, width, height) in pixels of the picture")
    return ",".join(map(str, sides)).encode()
